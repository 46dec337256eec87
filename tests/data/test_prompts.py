import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils.epath.testing import mock_epath

from flax_pref.data.pick_a_pic import LabelledPair, write_pairs
from flax_pref.data.prompts import read_prompts

PARTIPROMPTS = Path(__file__).parents[3] / "shared" / "data" / "prompts" / "partiprompts.tsv"
PARTIPROMPTS_HEAD = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    '"G I G G L E" painted in thick colorful lettering\tIllustrations\tWriting & Symbols\t\n'
    'Dogs playing poker\tAnimals\tImagination\tDescription of "Dogs Playing Poker"\n'
)
GENEVAL = (
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
    '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], '
    '"prompt": "a photo of two clocks"}\n'
)
HPDV2_TEST = [
    {"prompt": "a cat", "image_path": ["0.jpg", "1.jpg"], "rank": [0, 1], "raw_annotation": []},
    {"prompt": "a dog", "image_path": ["2.jpg", "3.jpg"], "rank": [1, 0], "raw_annotation": []},
    {"prompt": "a cat", "image_path": ["4.jpg", "5.jpg"], "rank": [1, 0], "raw_annotation": []},
]
HPDV2_TRAIN = [
    {"human_preference": [1, 0], "prompt": "a cat", "file_path": ["0.jpg", "1.jpg"], "user_hash": "u"},
    {"human_preference": [0, 1], "prompt": "a cat", "file_path": ["2.jpg", "3.jpg"], "user_hash": "v"},
]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, file)
        else:
            content = content if isinstance(content, (bytes, str)) else json.dumps(content)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def texts(prompts):
    assert [prompt.id for prompt in prompts] == list(range(len(prompts)))
    return [prompt.text for prompt in prompts]


def groups(prompts):
    return [prompt.group for prompt in prompts]


def pairs(*captions):
    return [
        LabelledPair(caption, b"zero", b"one", 1.0, f"{i}-0", f"{i}-1", "base", "base")
        for i, caption in enumerate(captions)
    ]


def test_partiprompts_keep_their_quotes_categories_and_notes(write):
    prompts = read_prompts(write("PartiPrompts.tsv", PARTIPROMPTS_HEAD))
    assert texts(prompts) == ["bond", '"G I G G L E" painted in thick colorful lettering', "Dogs playing poker"]
    assert groups(prompts) == ["Abstract", "Illustrations", "Animals"]
    assert prompts[2].record == {
        **{"Prompt": "Dogs playing poker", "Category": "Animals", "Challenge": "Imagination"},
        **{"Note": 'Description of "Dogs Playing Poker"'},
    }


@pytest.mark.skipif(not PARTIPROMPTS.is_file(), reason="needs the published PartiPrompts")
def test_the_published_partiprompts_are_read_as_they_are():
    prompts = read_prompts(PARTIPROMPTS)
    rows = PARTIPROMPTS.read_text(encoding="utf-8").removesuffix("\n").split("\n")[1:]
    assert texts(prompts) == [row.split("\t")[0] for row in rows]
    assert len(prompts) == 1632 and len(set(groups(prompts))) == 12
    assert all("\t".join(prompt.record.values()) == row for prompt, row in zip(prompts, rows, strict=True))


def test_the_styles_of_hpdv2_are_groups_and_ids_run_on_over_its_folder(write):
    for name, prompts in {"photo": ["p", "a"], "anime": ["a", "b", "a"], "concept-art": ["c"]}.items():
        folder = write(f"benchmark/{name}.json", prompts).parent
    write("benchmark/benchmark_imgs", "not read")
    prompts = read_prompts(folder)
    assert texts(prompts) == ["a", "b", "a", "c", "p", "a"]
    assert groups(prompts) == ["anime"] * 3 + ["concept-art"] + ["photo"] * 2
    assert prompts[3].record == {"prompt": "c"}
    assert read_prompts(folder / "anime.json") == prompts[:3]


@pytest.mark.parametrize(("rows", "expected"), [(HPDV2_TEST, ["a cat", "a dog"]), (HPDV2_TRAIN, ["a cat"])])
def test_comparisons_of_hpdv2_draw_a_prompt_once(write, rows, expected):
    prompts = read_prompts(write("rows.json", rows))
    assert texts(prompts) == expected and groups(prompts) == [""] * len(expected)
    assert prompts[0].record == rows[0]


def test_pick_a_pic_draws_a_caption_once_over_all_files_of_a_folder(tmp_path):
    write_pairs(tmp_path / "b.parquet", pairs("a dog", "a fox"))
    write_pairs(tmp_path / "a.parquet", pairs("a cat", "a cat", "a dog"))
    prompts = read_prompts(tmp_path)
    assert texts(prompts) == ["a cat", "a dog", "a fox"]
    assert prompts[1].record["image_0_uid"] == "2-0" and prompts[1].record["label_0"] == 1.0
    json.dumps([prompt.record for prompt in prompts])


def test_a_parquet_file_with_checksums_has_no_other_prompts_by_damage(tmp_path):
    file = tmp_path / "a.parquet"
    how = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"prompt": ["a cat"]}), file, **how)
    data, column = bytearray(file.read_bytes()), pq.read_metadata(file).row_group(0).column(0)
    place = data.rindex(b"a cat", 0, column.data_page_offset + column.total_compressed_size)
    data[place : place + 5] = b"a bat"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: damaged, or not a parquet file .*; download it again"):
        read_prompts(file)


def test_images_of_a_parquet_file_are_never_read(tmp_path):
    file = tmp_path / "a.parquet"
    write_pairs(file, pairs("a cat"))
    row_group = pq.read_metadata(file).row_group(0)
    chunk = row_group.column(pq.read_schema(file).names.index("jpg_0"))
    data, start = bytearray(file.read_bytes()), chunk.dictionary_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(data)
    with pytest.raises(OSError, match="deserialize"):
        pq.read_table(file)
    assert texts(read_prompts(file)) == ["a cat"]


def test_geneval_hands_its_records_to_the_scorer_as_they_were(write):
    prompts = read_prompts(write("evaluation_metadata.jsonl", GENEVAL))
    assert texts(prompts) == ["a photo of a bench", "a photo of two clocks"]
    assert groups(prompts) == ["single_object", "counting"]
    assert "".join(json.dumps(prompt.record) + "\n" for prompt in prompts) == GENEVAL


def test_text_files_have_a_prompt_in_each_line_that_is_not_blank(write):
    prompts = read_prompts(write("a.TXT", "\ufeffa cat\r\n\r\n  \r\na \u2028dog \r\na cat"))
    assert texts(prompts) == ["a cat", "a \u2028dog ", "a cat"]
    assert prompts[0].record == {"prompt": "a cat"}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_tables_of_spreadsheets_have_a_bom_quotes_and_windows_lines(write, newline):
    rows = ["\ufeffid,prompt,style", '1,"a ""red"" cat, asleep",photo', "", '2,"two', 'lines"', ""]
    prompts = read_prompts(write("a.csv", newline.join(rows)))
    assert texts(prompts) == ['a "red" cat, asleep', f"two{newline}lines"]
    assert groups(prompts) == ["photo", ""]
    assert [prompt.record["id"] for prompt in prompts] == ["1", "2"]


def test_a_tsv_whose_quotes_all_enclose_fields_is_read_with_quotes(write):
    prompts = read_prompts(write("a.tsv", 'text\tn\n"a sign ""HI"""\t1\n"a\tb"\t2\nc\t"3"\n'))
    assert texts(prompts) == ['a sign "HI"', "a\tb", "c"]


@pytest.mark.parametrize("table", [["seed", "caption", "prompt"], ["TEXT", "text"], ["Prompt", "text"], ["TEXT"]])
def test_columns_have_an_order_of_preference_and_column_goes_before_it(write, table):
    expected = next(name for name in ("prompt", "Prompt", "caption", "text", "TEXT") if name in table)
    files = [
        write("a.csv", ",".join(table) + "\n" + ",".join(f"a {name}" for name in table)),
        write("a.json", [{name: f"a {name}" for name in table}]),
        write("a.parquet", pa.table({name: [f"a {name}"] for name in table})),
    ]
    for file in files:
        assert texts(read_prompts(file)) == [f"a {expected}"]
        assert texts(read_prompts(file, column=table[0])) == [f"a {table[0]}"]


def test_json_objects_are_maps_to_prompts_or_styles_with_lists(write):
    prompts = read_prompts(write("map.json", {"17": "a cat", "18": {"caption": "a dog", "seed": 3}}))
    assert texts(prompts) == ["a cat", "a dog"] and groups(prompts) == ["", ""]
    assert [prompt.record for prompt in prompts] == [
        {"key": "17", "prompt": "a cat"},
        {"key": "18", "caption": "a dog", "seed": 3},
    ]
    prompts = read_prompts(write("styles.json", {"anime": ["a", "a"], "photo": ["b"]}))
    assert texts(prompts) == ["a", "a", "b"] and groups(prompts) == ["anime", "anime", "photo"]


def test_categories_of_pandas_are_groups_and_what_json_cannot_hold_is_left_out(write):
    table = {
        "prompt": pa.array(["a", "b"], pa.large_string()),
        "category": pa.array(["x", None]).dictionary_encode(),
        "image": pa.array([{"bytes": b"x", "path": "0.jpg"}] * 2),
        "when": pa.array([0, 1], pa.timestamp("ns")),
        "score": pa.array([0.5, None], pa.float16()),
        "note": pa.array(["n", "m"], pa.string_view()),
    }
    prompts = read_prompts(write("a.parquet", pa.table(table)))
    assert groups(prompts) == ["x", ""]
    assert json.loads(json.dumps(prompts[0].record)) == {"prompt": "a", "category": "x", "score": 0.5, "note": "n"}


def test_files_of_a_bucket_are_read_like_local_ones(write, tmp_path):
    write("set/b.parquet", pa.table({"prompt": ["two"]}))
    write("set/a.parquet", pa.table({"prompt": ["one"]}))
    write("a.txt", "three")

    def local(original, path, *arguments):
        return original(os.fspath(path).replace("gs://bucket", str(tmp_path)), *arguments)

    def glob(original, path):
        return [found.replace(str(tmp_path), "gs://bucket") for found in local(original, path)]

    with mock_epath(open=local, exists=local, isdir=local, glob=glob):
        assert texts(read_prompts("gs://bucket/set")) == ["one", "two"]
        assert texts(read_prompts("gs://bucket/a.txt")) == ["three"]
        with pytest.raises(FileNotFoundError, match=r"gs://bucket/b\.txt: no such file"):
            read_prompts("gs://bucket/b.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.yaml",
            "a cat",
            r"a\.yaml: unknown kind of file '\.yaml'; .*\.txt, \.csv, \.tsv, \.json, \.jsonl, \.parquet",
        ),
        ("a.txt", "a cat\nein B\xe4r".encode("latin-1"), r"a\.txt, line 2: not UTF-8 .*; save the file as UTF-8"),
        ("a.txt", " \n\n", r"a\.txt: no prompts in it"),
        ("a.csv", "", r"a\.csv: no prompts in it"),
        ("a.csv", "prompt\n", r"a\.csv: no prompts in it"),
        ("a.csv", "Prompts,id\na cat,1", r"a\.csv, line 2: no column .*; there are 'Prompts', 'id': .* --column"),
        ("a.csv", "prompt,id\na cat,1\n,2\n", r"a\.csv, line 3: 'prompt' is \"\"; expected a text"),
        ("a.csv", "prompt\na cat, asleep\n", r"a\.csv, line 2: 2 fields, but the header has 1; quote"),
        ("a.csv", 'prompt\n"a" cat\n', r"a\.csv, line 2: ',' expected after '\"'; quote"),
        ("a.csv", 'prompt\n"a cat\na dog\n', r"a\.csv, line 3: unexpected end of data; quote"),
        ("a.tsv", "Prompt\tNote\nbond\n\tb", r"a\.tsv, line 3: 'Prompt' is \"\""),
        ("a.json", '[\n"a",\n"b"', r"a\.json, line 3: not JSON"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}', r"a\.json, line 2: not JSON .*\.jsonl has one in each line"),
        ("a.json", "[" * 100_000, r"a\.json, line 1: not JSON"),
        ("a.json", "7", r"a\.json: holds 7; expected a list of prompts, or an object"),
        ("a.json", [], r"a\.json: no prompts in it"),
        ("a.json", ["a", None], r"a\.json, row 1: null is no prompt; expected a text"),
        ("a.json", ["a", "half an emoji \ud83d"], r"a\.json, row 1: 'prompt' is \"half an emoji \\ud83d\"; expected"),
        ("a.json", [{"prompt": "a"}, {"prompt": None}], r"a\.json, row 1: 'prompt' is null; expected a text"),
        ("a.json", [{"prompt": " \n"}], r"a\.json, row 0: 'prompt' is \" \\n\"; expected a text"),
        ("a.json", {"x": 5}, r"a\.json, \"x\": 'prompt' is 5; expected a text"),
        ("a.json", {"x": ["a", ""]}, r"a\.json, \"x\", row 1: 'prompt' is \"\"; expected a text"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', r"a\.jsonl, line 3: not JSON"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": ["b"]}\n',
            r"a\.jsonl, line 2: 'prompt' is \[\"b\"\]; expected a text",
        ),
        ("a.parquet", b"PAR1 no parquet", r"a\.parquet: damaged, or not a parquet file .*; download it again"),
        ("a.parquet", pa.table({"caption": ["a", None]}), r"a\.parquet, row 1: 'caption' is null; expected a text"),
        (
            "a.parquet",
            pa.table({"jpg": [b"a"], "n": [1]}),
            r"a\.parquet, row 0: no column .*; there are 'n': .* --column",
        ),
        ("a.parquet", pa.table({"prompt": [None]}), r"a\.parquet, row 0: 'prompt' is null; expected a text"),
        ("a.parquet", pa.table({"prompt": pa.array([], pa.string())}), r"a\.parquet: no prompts in it"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_the_place(write, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(write(name, content))
    assert "\n" not in str(caught.value)


def test_parquet_text_that_is_not_utf8_names_the_file(write):
    file = write("a.parquet", pa.table({"prompt": ["a cat"]}))
    file.write_bytes(file.read_bytes().replace(b"a cat", b"a \xffat"))
    with pytest.raises(ValueError, match=r"a\.parquet: damaged, or not a parquet file .*; download it again"):
        read_prompts(file)


def test_a_column_that_is_not_there_is_not_replaced_by_another(write):
    with pytest.raises(ValueError, match=r"a\.csv, line 2: no column of texts named 'Text'; there are 'prompt', 'id'"):
        read_prompts(write("a.csv", "prompt,id\na cat,1\n"), column="Text")


def test_missing_files_and_folders_without_a_set_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file; expected a file or folder of prompts"):
        read_prompts(tmp_path / "none.csv")
    folder = write("mixed/a.md", "a cat").parent
    with pytest.raises(FileNotFoundError, match=r"mixed: expected \*\.json or \*\.parquet, but there are neither"):
        read_prompts(folder)
    write("mixed/a.json", ["a cat"])
    write("mixed/a.parquet", pa.table({"prompt": ["a cat"]}))
    with pytest.raises(FileNotFoundError, match=r"mixed: expected \*\.json or \*\.parquet, but there are both"):
        read_prompts(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a cat\r\nein B\u00e4r\n"),
        ("a.csv", 'prompt,style\r\n"a, ""cat""",x\r\nein B\u00e4r,y\r\n'),
        ("a.tsv", PARTIPROMPTS_HEAD),
        ("a.json", json.dumps({"x": ["a cat"], "y": "a dog", "z": HPDV2_TEST})),
        ("a.jsonl", GENEVAL),
        ("a.parquet", pa.table({"prompt": ["a", "b"], "tag": ["x", "y"], "n": [1, 2], "jpg": [b"0", b"1"]})),
    ],
)
def test_damaged_files_are_prompts_or_one_line(write, name, content):
    file = write(name, content)
    whole, rng, read = file.read_bytes(), random.Random(0), 0
    texts(read_prompts(file))
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            start = rng.randrange(len(data))
            data[start : start + rng.randrange(4)] = rng.choice(
                [b"", b'"', b"\n", b"\0", b"\t", b"null", rng.randbytes(1)]
            )
        file.write_bytes(data)
        try:
            prompts = read_prompts(file)
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith(str(file)) and "\n" not in str(error)
            continue
        read += 1
        assert all(text.strip() for text in texts(prompts))
        assert json.loads(json.dumps(groups(prompts))) == groups(prompts)
        json.dumps([prompt.record for prompt in prompts])
    assert 0 < read < 300
