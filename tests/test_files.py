import errno
import os
import signal
import socket
import subprocess
import sys

import filelock
import pytest

from flax_pref.config import UserError
from flax_pref.files import one_writer, remedy

HOLD = """import sys; from flax_pref.files import one_writer, remedy
with one_writer(sys.argv[1]): print("held", flush=True); sys.stdin.read()"""


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        where = rf"process {holder.pid} on {socket.gethostname()}, since 2"
        told = rf"(?s){tmp_path}: another program writes .*one_writer.*; {where}.*; wait for it, or end it"
        with pytest.raises(UserError, match=told), one_writer(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        # A kill leaves no lock, and who was killed is not named.
        with (
            one_writer(tmp_path),
            pytest.raises(UserError, match=f"process {os.getpid()} on"),
            one_writer(tmp_path),
        ):
            pass
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_locked_is_used_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    def fail(lock):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", fail)
    with one_writer(tmp_path):
        pass
    assert capsys.readouterr().err.startswith(f"{tmp_path}: cannot be locked (No locks available); start no other")


def test_a_bucket_is_not_locked():
    with one_writer("gs://bucket/run"):
        pass


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EACCES, "make the folder writable"),
        (errno.EROFS, "make the folder writable"),
        (errno.ENOTDIR, "remove the cause"),
        (errno.EIO, "remove the cause"),
    ],
)
def test_only_a_full_disk_asks_for_space_and_only_a_folder_without_rights_for_them(number, told):
    assert remedy(OSError(number, os.strerror(number))) == told
