"""What docs/running.md tells users to type: every block is parsed by what would run it, or by a table of its flags.

Of other pages the commands of this project are.
"""

import contextlib
import functools
import importlib
import io
import math
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from pages import PAGES
from pages import commands as commands_of

from flax_pref import config as flags
from flax_pref.config import UserError
from flax_pref.diffusion.rules import find_rule
from flax_pref.parallel import hosts
from flax_pref.programs import PROGRAMS
from flax_pref.training.trainer import TrainConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")

# Flags of commands that are not ours, those that the page has a use for. Their pages:
#   gcloud   https://docs.cloud.google.com/sdk/gcloud/reference/ and the command with slashes
#   kubectl  https://kubernetes.io/docs/reference/kubectl/generated/
#   Slurm    https://slurm.schedmd.com/sbatch.html, srun.html, scontrol.html
#   gcsfuse  https://docs.cloud.google.com/storage/docs/cloud-storage-fuse/cli-options
#   uv       https://docs.astral.sh/uv/reference/cli/
#   hf       https://huggingface.co/docs/huggingface_hub/guides/cli
#   docker   https://docs.docker.com/reference/cli/docker/
FLAGS = {
    "gcloud compute tpus queued-resources create": (
        "--node-id --zone --accelerator-type --runtime-version --spot --reserved --service-account"
    ),
    "gcloud compute tpus queued-resources describe": "--zone",
    "gcloud compute tpus queued-resources delete": "--zone --force --async",
    "gcloud compute tpus tpu-vm ssh": "--zone --worker --command",
    "gcloud compute tpus tpu-vm scp": "--zone --worker --recurse",
    "gcloud container clusters create-auto": "--location --release-channel",
    "gcloud container clusters get-credentials": "--location",
    "gcloud artifacts repositories create": "--location --repository-format",
    "gcloud auth configure-docker": "",
    "python evaluation/evaluate_images.py": "--outfile --model-path",  # of GenEval
    "python integrations/reward_server/serve.py": (
        "--scorer --model --repository --device --host --port --batch-size --wait --queue"
    ),
    "docker build": "--file --tag",
    "docker push": "",
    "docker run": "--rm --privileged --net --ulimit --gpus --volume --env",
    "gcloud projects describe": "",
    "gcloud storage buckets create": "--location --uniform-bucket-level-access --enable-hierarchical-namespace",
    "gcloud storage buckets add-iam-policy-binding": "--member --role",
    "gcloud storage cp": "--recursive",
    "kubectl apply": "-f --server-side",
    "kubectl create serviceaccount": "",
    "kubectl get": "",
    "kubectl delete": "",
    "kubectl logs": "--follow --selector --container --prefix",
    "sbatch": (
        "--job-name --nodes --ntasks-per-node --gpus-per-node --cpus-per-task --time --signal --requeue --open-mode"
        " --output"
    ),
    "srun": "--cpus-per-task",
    "scontrol requeue": "",
    "gcsfuse": "--metadata-cache-ttl-secs",
    "uv venv": "--python --clear",
    "uv pip install": "--editable",
    "pip install": "-e --editable --no-cache-dir",
    "venv": "",
    **dict.fromkeys(("make demo", "make study", "make test"), ""),
    "hf download": "--local-dir --include",
    "hf auth login": "",
    "ssh": "-L",
    "git archive": "--format --output",
    "apt-get update": "",
    "apt-get install": "--yes",
    "curl": "-sSf -LsSf",
    "tar": "-xzf -C",
    "tail": "-f",
    **dict.fromkeys(("bash", "cd", "chown", "echo", "exit", "export", "sh", "tee"), ""),
    **{"lsb_release": "-cs", "mkdir": "-p", "mountpoint": "-q", "set": "-e", "[": "-eq"},
}
# Pages whose commands name files that the page itself makes; test_howto.py runs them.
OWN_FILES = ("docs/howto/rule.md", "docs/howto/method.md", "docs/howto/reward.md")
GCLOUD_WIDE = {"--project", "--format", "--quiet"}
REQUIRED = {
    "gcloud compute tpus queued-resources create": {"--node-id", "--accelerator-type", "--runtime-version"},
    "gcloud compute tpus tpu-vm ssh": {"--worker", "--command"},
    "gcloud compute tpus tpu-vm scp": {"--worker"},
}
KEYWORDS = {"if", "then", "fi", "do", "done", "else", "sudo", "nohup", "exec", "||"}

# https://docs.cloud.google.com/tpu/docs/runtimes; the number in an accelerator type counts chips, or with v5p cores,
# two of a chip (https://docs.cloud.google.com/tpu/docs/v5p)
RUNTIMES = {"v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
CORES = {"v5litepod": 1, "v5p": 2, "v6e": 1}
# https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: chips of a host in slices of several
CHIPS_OF_HOST = {"tpu-v5-lite-podslice": 4, "tpu-v6e-slice": 4, "tpu-v5p-slice": 4}
# https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/ and https://kubernetes.io/docs/reference/kubernetes-api/
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "annotations", "labels"},
    "spec": {
        *("failurePolicy", "replicatedJobs"),
        *("completions", "parallelism", "backoffLimit", "template"),
        *("serviceAccountName", "restartPolicy", "nodeSelector", "containers", "volumes"),
    },
    "failurePolicy": {"maxRestarts"},
    "replicatedJobs": {"name", "replicas", "template"},
    "template": {"metadata", "spec"},
    "containers": {"name", "image", "command", "resources", "volumeMounts", "env", "securityContext"},
    "securityContext": {"runAsUser"},
    "resources": {"requests", "limits"},
    "volumeMounts": {"name", "mountPath"},
    "volumes": {"name", "csi"},
    "csi": {"driver", "volumeAttributes"},
    # https://docs.cloud.google.com/kubernetes-engine/docs/reference/cloud-storage-fuse-csi-driver/volume-attr
    "volumeAttributes": {"bucketName", "mountOptions"},
}


class Parsed(BaseException):
    """A program has read its flags and would begin to work."""


@functools.cache
def parse(module, *arguments):
    """The config that a program makes of its flags; it does nothing else."""
    read = flags._parse

    def stop(*given, **options):
        raise Parsed(read(*given, **options))

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.chdir(ROOT)
        patch.setattr(flags, "_parse", stop)
        try:
            importlib.import_module(module).main(list(arguments))
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit:
            raise ValueError(said.getvalue().strip()) from None
    raise ValueError(f"{module} does not read its flags with flax_pref.config")


def problems(page):
    """Everything that is wrong with the blocks of a page."""
    kind, number = re.search(r"--accelerator-type=(\w+)-(\d+)", page).groups()
    chips = int(number) // CORES[kind]
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        if language == "sh":
            yield from shell_problems(block, chips if "gcloud" in block else None)
        elif language == "yaml":
            yield from told(manifest_problems(block, page))
        else:
            yield f"a block of {language or 'no language'}, which nothing here checks"


def told(found):
    """What a check finds, and what it cannot go on from."""
    try:
        yield from found
    except (KeyError, ValueError, UserError, ImportError) as error:
        yield f"{type(error).__name__}: {error}"


def shell_problems(block, chips):
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    if checked.stderr:
        yield checked.stderr
        return
    if header := dict(re.findall(r"^#SBATCH (--[\w-]+)=?(\S*)$", block, re.MULTILINE)):
        yield from sbatch_problems(header, block)
        chips = int(header["--nodes"]) * int(header["--gpus-per-node"])
    for words in commands(block):
        yield from told(command_problems(words, chips))


def commands(text):
    """The simple commands of a script, as lists of words, without keywords, assignments and redirections."""
    text = re.sub(r"^\s*#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    text = re.sub(r" \d?(>>?|<)(&\d| *[\w./$]+)", "", text)
    while inner := re.search(r"\$\(([^()]+)\)", text):
        text = f"{text[: inner.start()]}RESULT{text[inner.end() :]}\n{inner[1]}"
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words = []
    for word in [*lexer, "\n"]:
        if set(word) <= set(";&|()\n"):
            if words:
                yield words
            words = []
        elif words or not (word in KEYWORDS or re.match(r"[A-Za-z_]\w*=", word)):
            words.append(word)


def command_problems(words, chips):
    names = [Path(words[0]).name, *words[1:]]
    if re.fullmatch(r"python[\d.]*", names[0]) and names[1] == "-m":
        names = names[2:]
    if names[0].partition(":")[0] == "flax-pref":  # or an image, whose entry point it is
        names = [PROGRAMS[names[1]].module, *names[2:]]
    if names[0].startswith(("train.", "sample.")):
        yield from program_problems(names[0], names[1:], chips)
        return
    command = next((" ".join(names[:n]) for n in range(6, 0, -1) if " ".join(names[:n]) in FLAGS), None)
    if command is None:
        yield f"{' '.join(words[:6])}: no such command is known"
        return
    given = names[len(command.split()) :]
    programs = ("flax-pref:tpu", "flax-pref:cuda") if command == "docker run" else ("python",)
    inner = next((i for i, word in enumerate(given) if Path(word).name in programs), len(given))
    used = {word.partition("=")[0] for word in given[:inner] if word.startswith("-")}
    known = set(FLAGS[command].split()) | (GCLOUD_WIDE if command.startswith("gcloud") else set())
    for flag in sorted(used - known):
        yield f"{command}: no flag {flag} is known"
    for flag in sorted(REQUIRED.get(command, set()) - used):
        yield f"{command}: needs {flag}"
    if inner < len(given):
        yield from command_problems(given[inner:], chips)
    for word in given[:inner]:
        flag, _, value = word.partition("=")
        if flag == "--command":
            yield from shell_problems(value, chips)
        if flag == "--accelerator-type" and f"--runtime-version={RUNTIMES[value.rpartition('-')[0]]}" not in given:
            yield f"{value}: has another runtime version"
        for extra in re.findall(r"^\.\[(\w+)\]$", word):
            if extra not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]:
                yield f"{word}: pyproject.toml has no extra {extra}"


def program_problems(module, arguments, chips):
    config = parse(module, *arguments)
    if hasattr(config, "rule"):
        find_rule(config.rule)
    text = getattr(config, "hosts", None)
    if text is not None and text not in ("auto", "none"):
        hosts._addresses(text, f"--hosts {text}")
    for name, value in vars(config).items():
        if isinstance(value, Path) and ":/" in str(value):
            yield f"{module} --{name} {value}: needs a folder"
    if isinstance(config, TrainConfig) and chips is not None:
        axes = {name: int(size) for name, size in (part.split("=") for part in config.mesh.split(","))}
        parts = config.accumulation * chips // axes.get("tensor", 1)
        if chips % math.prod(size for size in axes.values() if size > 0) or config.batch_size % parts:
            yield f"{module}: a batch of {config.batch_size} with {config.mesh} does not go into {chips} devices"


def sbatch_problems(header, block):
    for flag in sorted(set(header) - set(FLAGS["sbatch"].split())):
        yield f"sbatch: no flag {flag} is known"
    if header["--ntasks-per-node"] != header["--gpus-per-node"]:
        yield "sbatch: a process uses one GPU, but there are not as many tasks as GPUs on a node"
    if not re.fullmatch(r"TERM@\d+", header["--signal"]):
        yield f"sbatch: --signal={header['--signal']} is not SIGTERM to the processes"
    if not re.search(r"\$status -eq 75 \]; then\s+scontrol requeue", block) or "--requeue" not in header:
        yield "sbatch: a job that has saved and ended does not go back into the queue"


def manifest_problems(block, page):
    jobset = yaml.safe_load(block)
    yield from field_problems(jobset, "")
    if (jobset["apiVersion"], jobset["kind"]) != ("jobset.x-k8s.io/v1alpha2", "JobSet"):
        yield "manifest: not a JobSet"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    metadata, pod = job["template"]["metadata"], job["template"]["spec"]
    (container,), (volume,) = pod["containers"], pod["volumes"]
    selector = pod["nodeSelector"]
    kind, topology = (selector[f"cloud.google.com/gke-tpu-{name}"] for name in ("accelerator", "topology"))
    chips = math.prod(map(int, topology.split("x")))
    if not job["completions"] == job["parallelism"] == chips / CHIPS_OF_HOST[kind]:
        yield f"manifest: {kind} {topology} has {chips // CHIPS_OF_HOST[kind]} hosts"
    if (
        job["backoffLimit"] != 0
        or pod["restartPolicy"] != "Never"
        or jobset["spec"]["failurePolicy"]["maxRestarts"] < 1
    ):
        yield "manifest: a pod that fails does not start all of them again"
    for kind_of_resource in ("requests", "limits"):
        if container["resources"][kind_of_resource] != {"google.com/tpu": CHIPS_OF_HOST[kind]}:
            yield f"manifest: {kind_of_resource} are not the chips of a host"
    if (
        metadata["annotations"] != {"gke-gcsfuse/volumes": "true"}
        or volume["csi"]["driver"] != "gcsfuse.csi.storage.gke.io"
    ):
        yield "manifest: the bucket is not mounted"
    (mount,) = container["volumeMounts"]
    if mount["name"] != volume["name"]:
        yield f"manifest: no volume {mount['name']}"
    # The names that the shell blocks give to the same things.
    names = dict(re.findall(r"\b([A-Z]+)=([\w-]+)", page))
    if volume["csi"]["volumeAttributes"]["bucketName"] != names["BUCKET"]:
        yield "manifest: another bucket than on the rest of the page"
    image = re.search(r"--tag=(\S+)", page)[1].replace("$REGION", names["REGION"]).replace("$PROJECT", names["PROJECT"])
    if container["image"] != image:
        yield f"manifest: the image is not {image}"
    if f"kubectl create serviceaccount {pod['serviceAccountName']}\n" not in page:
        yield f"manifest: nobody makes the account {pod['serviceAccountName']}"
    yield from command_problems(container["command"], chips)


def field_problems(value, name):
    if isinstance(value, list):
        for item in value:
            yield from field_problems(item, name)
    elif isinstance(value, dict) and name in FIELDS:
        for field in sorted(set(value) - FIELDS[name]):
            yield f"manifest: {name or 'JobSet'} has no field {field}"
        for field, inside in value.items():
            yield from field_problems(inside, field)


def test_every_command_and_manifest_of_the_page_is_understood():
    assert list(problems(PAGE)) == []


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("--optimizer.warmup-steps 1", "--optimizer.warmup 1", "unrecognized|Unrecognized"),
        ("train.modules configs/sdxl/dpo.py", "train.modules configs/sdxl/dop.py", "no such config file"),
        ("train.encode configs", "train.encoder configs", "No module named 'train.encoder'"),
        ("--rule fine_tuned", "--rule finetuned", "finetuned"),
        ("--prompts gs://", "--prompt a --prompts gs://", "either --prompt with texts or --prompts"),
        ("--output /mnt/flax-pref/runs/dpo >>", "--output gs://bucket/dpo >>", "needs a folder"),
        ("--hosts 10.0.0.2:1234,2,1", "--hosts 10.0.0.2:1234,2,2", "expected auto, or ADDRESS"),
        ("--accelerator-type=v5litepod-16", "--accelerator-type=v5litepod-256", "does not go into 256 devices"),
        ("--accelerator-type=v5litepod-16", "--accelerator-type=v5p-32", "another runtime version"),
        ("tpu-vm scp setup.sh", "tpu-vm copy setup.sh", "no such command"),
        ("--worker=all --command", "--workers=all --command", "no flag --workers"),
        (" --runtime-version=v2-alpha-tpuv5-lite", "", "needs --runtime-version"),
        ("--metadata-cache-ttl-secs=0 $1", "--metadata-cache-ttl=0 $1", "no flag --metadata-cache-ttl"),
        ('"bash setup.sh $BUCKET"', '"bash setup.sh $BUCKET', "unexpected EOF"),
        ('".[tpu]" gcsfs\n```', '".[tpus]" gcsfs\n```', "no extra tpus"),
        ("--gpus=all", "--gpu=all", "no flag --gpu"),
        ("flax-pref:cuda sample --model", "flax-pref:cuda sample --models", "Missing .*--model"),
        ("completions: 4", "completions: 16", "has 4 hosts"),
        ("gke-tpu-topology: 4x4", "gke-tpu-topology: 2x4", "has 2 hosts"),
        ("nodeSelector:", "nodeSelectors:", "no field nodeSelectors"),
        ("- --data=/mnt", "- --dataset=/mnt", "unrecognized|Unrecognized"),
        ("bucketName: my-flax-pref", "bucketName: flax-pref", "another bucket"),
        ("backoffLimit: 0", "backoffLimit: 6", "start all of them again"),
        ("#SBATCH --ntasks-per-node=8", "#SBATCH --ntasks-per-node=1", "not as many tasks as GPUs"),
        ("#SBATCH --nodes=2", "#SBATCH --nodes=3", "does not go into 24 devices"),
        ("#SBATCH --requeue", "#SBATCH --requeued", "no flag --requeued"),
        ("-eq 75", "-eq 0", "does not go back into the queue"),
        ("srun --cpus-per-task", "srun --gpus-per-task=1 --cpus-per-task", "no flag --gpus-per-task"),
    ],
)
def test_a_mistake_on_the_page_would_be_found(right, wrong, expected):
    assert right in PAGE
    found = list(problems(PAGE.replace(right, wrong)))
    assert any(re.search(expected, problem) for problem in found), found


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("README.md", "docs/running.md", *OWN_FILES)])
def test_every_command_of_another_page_is_understood(page):
    programs = [words for text in commands_of(page) for words in commands(text) if "bench" not in words]
    assert [problem for words in programs for problem in told(command_problems(words, None))] == []


def test_a_mistake_on_another_page_would_be_found():
    (words,) = commands("flax-pref sample --model demo --prompt a --rule cpdg --w 1")
    assert "cpdg" in "".join(told(command_problems(words, None)))
