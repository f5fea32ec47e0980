"""Reading rows, error messages, and the stream of prompts."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re

import numpy
import pyarrow
import pytest
from letters import LetterFamily
from PIL import Image
from pyarrow import parquet
from run_files import write

from rlcore import registry
from rlcore.cli.main import main
from rlcore.config.sections import DatasetConfig, ModelConfig
from rlcore.data.chat import chat, check_opening, conversation
from rlcore.data.files.records import read_records
from rlcore.data.images import Pictures, decode_image, sizes
from rlcore.data.prompts import RowFilter
from rlcore.data.rows import load_rows, rows
from rlcore.errors import ConfigError, PluginError
from rlcore.model.loading import resolve
from rlcore.types import Row


def jsonl(folder, *values, name="train.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n", encoding="utf-8")
    return path


def png(mode="RGB", colour=(10, 20, 30)):
    stream = io.BytesIO()
    Image.new(mode, (4, 3), colour).save(stream, "PNG")
    return stream.getvalue()


ROWS = RowFilter(LetterFamily(), max_prompt_tokens=100)
ASKED = [{"role": "user", "content": "1+1?"}]
QUESTIONS = [{"prompt": "1+1?", "answer": 2, "level": "easy"}, {"prompt": "2+2?", "answer": "4", "level": "hard"}]


def test_the_same_rows_come_from_lines_a_list_and_parquet(tmp_path):
    values = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "é\u2028?", "answer": "4"}]
    (tmp_path / "list.json").write_text(json.dumps(values))
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "table.parquet")
    files = [jsonl(tmp_path, *values), jsonl(tmp_path, *values, name="lines.json"), "list.json", "table.parquet"]
    found = [[record.values for record in read_records(tmp_path / file)] for file in files]
    assert found == [values] * 4


def test_a_record_says_where_it_stands(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [(r.where, r.id) for r in read_records(path)] == [("train.jsonl:1", "train:1"), ("train.jsonl:3", "train:3")]
    parquet.write_table(pyarrow.Table.from_pylist([{"a": 1}]), tmp_path / "x.parquet")
    assert next(read_records(tmp_path / "x.parquet")).where == "x.parquet row 1"


def test_a_folder_is_read_in_the_order_of_its_file_names(tmp_path):
    jsonl(tmp_path, {"a": 2}, name="b.jsonl")
    jsonl(tmp_path, {"a": 1}, name="a.jsonl")
    (tmp_path / "README.md").write_text("not data")
    assert [record.id for record in read_records(tmp_path)] == ["a:1", "b:1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, r"gone\.jsonl: no such data file"),
        ("rows.csv", b"a,b", r"rows\.csv: unknown suffix '\.csv'; a data file is \.jsonl"),
        ("rows.jsonl", b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not valid JSON"),
        ("rows.jsonl", b"[1, 2]\n", r"rows\.jsonl:1: a row is an object with columns, this is a list"),
        ("rows.jsonl", b"\xff\xfe\xfa", r"rows\.jsonl: cannot be read"),
        ("rows.json", b'[{"a": 1}, 5]', r"rows\.json row 2: a row is an object"),
        ("rows.json", b'[{"a": 1}', r"rows\.json: not valid JSON"),
        ("rows.parquet", b"PAR?", r"rows\.parquet: not a readable parquet file"),
        ("rows.jsonl", b"\n\n", r"rows\.jsonl: holds no rows"),
        ("rows.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"rows\.jsonl:1: not valid JSON: Exceeds the limit"),
        ("rows.jsonl", b'{"a": 1, "a": 2}', r"rows\.jsonl:1: not valid JSON: 'a' stands twice in an object"),
        ("rows.jsonl", '{"a": "é"}'.encode("latin-1"), r"rows\.jsonl: cannot be read: .*; save it as UTF-8"),
        ("rows.jsonl", b'{"a": ' + b"[" * 100_000, r"rows\.jsonl:1: not valid JSON: maximum recursion"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read_records(tmp_path / name))


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [pyarrow.array(["x"])] * 3
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["prompt", "answer", "answer"]), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"x\.parquet: two columns are called 'answer'; rename one"):
        rows(tmp_path / "x.parquet")


def test_a_folder_of_two_kinds_or_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match="this has no data files"):
        list(read_records(tmp_path))
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"this has \.json and \.jsonl"):
        list(read_records(tmp_path))


def test_a_relative_path_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"data/q\.jsonl: no such .* the working directory: no {tmp_path}/data/q\.jsonl$"):
        rows("data/q.jsonl")


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_and_line_ends_of_windows_change_nothing(start, end, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(start + end.join([b'{"a": "1"}', b'{"a": "2"}', b""]))
    assert [record.values for record in read_records(tmp_path / "rows.jsonl")] == [{"a": "1"}, {"a": "2"}]


def test_no_path_is_named():
    with pytest.raises(ConfigError, match="set its path"):
        rows(None)


def test_rows_take_named_columns_and_hand_over_the_others(tmp_path):
    path = jsonl(tmp_path, {"q": "1+1?", "a": 2, "s": "It is 2.", "name": "first", "level": 3})
    (row,) = rows(path, prompt="q", answer="a", target="s", id="name", instruction="Use digits.")
    assert row.messages == [{"role": "user", "content": "1+1? Use digits."}]
    assert (row.id, row.answer, row.target, dict(row.fields)) == ("first", "2", "It is 2.", {"level": 3})


def test_a_prompt_may_be_a_chat(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "1+1?"}]
    (row,) = rows(jsonl(tmp_path, {"prompt": turns, "answer": "2"}))
    assert row.messages == turns


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"promt": "x", "answer": "1"}, r"train\.jsonl:1: no column 'prompt' among promt, answer; did you mean 'promt'\?"),
        ({"prompt": "x", "gold": "1"}, r"train\.jsonl:1: no column 'answer' among prompt, gold$"),
        ({"prompt": "x", "answer": None}, r"train\.jsonl:1: column 'answer' is empty"),
        ({"prompt": "x", "answer": ""}, r"train\.jsonl:1: column 'answer' is empty"),
        ({"prompt": "", "answer": "1"}, r"train\.jsonl:1: column 'prompt' is empty"),
        ({"prompt": "x", "answer": ["1"]}, r"train\.jsonl:1: column 'answer' holds a list"),
        ({"prompt": ["x"], "answer": "1"}, r"train\.jsonl:1: a chat message is an object with role and content"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, r"train\.jsonl:1: the content of a message is a text"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}], "answer": "1"}, r"train\.jsonl:1: a message's part is"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}, r"1: 1 <image> place.* for 0 images"),
        ({"prompt": "  \n", "answer": "1"}, r"jsonl:1: column 'prompt' is empty"),
        ({"prompt": "x", "answer": " \t"}, r"jsonl:1: column 'answer' is empty"),
        ({"prompt": "x", "answer": float("nan")}, r"jsonl:1: column 'answer' is empty"),
        ({"prompt": "x", "answer": float("inf")}, r"jsonl:1: column 'answer' holds inf; it must be .* finite number"),
        ({"prompt": "x", "answer": True}, r"jsonl:1: column 'answer' holds a bool; it must be a text or a number"),
        ({"prompt": [], "answer": "1"}, r"train\.jsonl:1: the prompt is a list without messages"),
        ({"prompt": [{"role": "user", "content": " "}], "answer": "1"}, r"1: the last message of the prompt is empty"),
        ({"prompt": [*ASKED, {"role": "assistant", "content": "2"}], "answer": "2"}, r"jsonl:1: .* ends with the assistant's"),
        ({"prompt": "<image>What?", "answer": "1", "images": ["a.png"]}, r"1: .* option images does not name 'images'"),
        ({"prompt": "x \ud83d", "answer": "1"}, r"jsonl:1: column 'prompt' holds \\ud83d, half .* at character 3;"),
        ({"prompt": [{"role": "user", "content": "\udc00"}], "answer": "1"}, r"jsonl:1: column 'prompt' holds \\udc00, half"),
        ({"prompt": "x", "answer": "1", "more": {"deep": [{"a\ud83d": 1}]}}, r"jsonl:1: column 'more' holds \\ud83d, half"),
        ({"prompt": "x", "answer": "1", "\ud83d": 1}, r"train\.jsonl:1: the name of a column holds \\ud83d, half"),
    ],
)
def test_a_bad_row_is_named(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        list(rows(jsonl(tmp_path, values)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (18.0, "18"), (5.5, "5.5"), (-0.0, "0"), (1e-7, "0.0000001"), (1e22, "1" + "0" * 22), (0.1, "0.1"),
        (10**30, "1" + "0" * 30), (-3, "-3"), (100.0, "100"), (0, "0"), ("18.0", "18.0"), (" 18 ", " 18 "),
    ],
)  # fmt: skip
def test_a_number_is_the_text_that_one_would_write(value, text, tmp_path):
    (row,) = rows(jsonl(tmp_path, {"prompt": "x", "answer": value}))
    assert row.answer == text


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (pyarrow.float64(), ["18", "0.1"]), (pyarrow.float32(), ["18", "0.1"]), (pyarrow.decimal128(10, 3), ["18", "0.1"]),
        (pyarrow.decimal256(60, 40), ["18", "0.1"]),
    ],
)  # fmt: skip
def test_a_column_of_a_table_gives_the_same_digits_in_any_number_type(kind, texts, tmp_path):
    answers = pyarrow.array(["18", "0.1"]).cast(kind)
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "answer": answers}), tmp_path / "x.parquet")
    assert [row.answer for row in rows(tmp_path / "x.parquet")] == texts


def test_a_row_without_images_may_talk_of_the_tag(tmp_path):
    (row,) = rows(jsonl(tmp_path, {"prompt": "What does the HTML tag <image> do?", "answer": "x"}))
    assert row.messages == [{"role": "user", "content": "What does the HTML tag <image> do?"}]


def test_a_tag_without_its_image_is_named_and_may_be_said_to_be_text(tmp_path):
    with pytest.raises(ConfigError, match=r"1: the prompt holds <image> and 'images' has no image for it; fill it, or, where"):
        list(rows(jsonl(tmp_path, {"prompt": "<image>What?", "answer": "1", "images": []}), images="images"))
    asked = [{"role": "user", "content": [{"type": "text", "text": "<image>What?"}]}]
    (row,) = rows(jsonl(tmp_path, {"prompt": asked, "answer": "1", "images": None}), images="images")
    assert row.messages == [{"role": "user", "content": "<image>What?"}]


def test_beside_image_parts_the_tag_is_text():
    content = [{"type": "image"}, {"type": "text", "text": "Is <image> a tag?"}]
    assert conversation([{"role": "user", "content": content}], images=1) == [{"role": "user", "content": content}]


def test_a_row_without_a_system_message_gets_the_run_files(tmp_path):
    own = [{"role": "system", "content": "Be brief."}, *ASKED]
    path = jsonl(tmp_path, {"prompt": ASKED, "answer": "2"}, {"prompt": own, "answer": "2"})
    first, second = load_rows(DatasetConfig(path=str(path)), system="Look.")
    assert first.messages == [{"role": "system", "content": "Look."}, *ASKED] and second.messages == own


def test_placeholders_become_image_parts_in_order():
    (message,) = chat("See <image> and <image>.", images=2)
    kinds = [part.get("text", part["type"]) for part in message["content"]]
    assert kinds == ["See ", "image", " and ", "image", "."]


def test_images_without_placeholders_come_first_and_the_instruction_last():
    (message,) = chat("What?", images=2, instruction="Be brief.")
    assert message["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What? Be brief."}]


def test_text_parts_without_images_are_plain_text():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}]}]
    assert conversation(parts) == [{"role": "user", "content": "ab"}]


def test_every_form_of_an_image_is_the_same_image(tmp_path):
    data = png()
    (tmp_path / "a.png").write_bytes(data)
    encoded = base64.b64encode(data).decode()
    forms = [
        Image.open(io.BytesIO(data)), data, {"bytes": data, "path": None}, {"bytes": None, "path": "a.png"}, "a.png",
        str(tmp_path / "a.png"), encoded, f"data:image/png;base64,{encoded}",
    ]  # fmt: skip
    images = [decode_image(form, "here", tmp_path) for form in forms]
    assert {(image.mode, image.size, image.tobytes()) for image in images} == {("RGB", (4, 3), bytes([10, 20, 30] * 12))}


@pytest.mark.parametrize(("mode", "clear"), [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))])
def test_transparency_is_white(tmp_path, mode, clear):
    assert decode_image(png(mode, clear), "here", tmp_path).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (9, 0, 0)), ("P", 0), ("L", 7), ("1", 0), ("I;16", 300)])
def test_a_transparent_colour_is_white_and_the_others_stay(tmp_path, mode, clear):
    image = Image.new(mode, (2, 1), clear)
    other = {"RGB": (9, 9, 9), "P": 1, "L": 51, "1": 1, "I;16": 257 * 51}[mode]
    image.putpixel((1, 0), other)
    if mode == "P":
        image.putpalette([0, 0, 0, 51, 51, 51])
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=clear)
    decoded = decode_image(stream.getvalue(), "here", tmp_path)
    kept = {"RGB": (9, 9, 9), "1": (255, 255, 255)}.get(mode, (51, 51, 51))
    assert [decoded.getpixel(place) for place in ((0, 0), (1, 0))] == [(255, 255, 255), kept]


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (numpy.arange(256, dtype="uint16") * 257, "I;16"), (numpy.arange(256, dtype="int32") * 257, "I"),
        (numpy.arange(256, dtype="float32") / 255, "F"),
    ],
)  # fmt: skip
def test_gray_of_more_than_eight_bits_is_scaled(pixels, mode, tmp_path):
    image = Image.fromarray(pixels.reshape(16, 16))
    image.save(tmp_path / "gray.tiff")
    assert image.mode == mode == Image.open(tmp_path / "gray.tiff").mode
    decoded = decode_image("gray.tiff", "here", tmp_path)
    assert decoded.mode == "RGB" and decoded.tobytes() == bytes(shade for shade in range(256) for _ in "RGB")


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (numpy.array([[-1, 5]], dtype="int32"), "mode I from -1 to 5 are not within 0 to 65535"),
        (numpy.array([[0, 70000]], dtype="int32"), "mode I from 0 to 70000 are not within 0 to 65535"),
        (numpy.array([[0, 255]], dtype="float32"), r"mode F from 0\.0 to 255\.0 are not within 0 to 1\.0; convert it"),
        (numpy.array([[0, numpy.nan]], dtype="float32"), "mode F from nan to nan"),
    ],
)
def test_gray_outside_of_its_range_is_refused(pixels, said, tmp_path):
    with pytest.raises(ConfigError, match=f"here: the image cannot be decoded: pixels of {said}"):
        decode_image(Image.fromarray(pixels), "here", tmp_path)


@pytest.mark.parametrize(("mode", "colour", "shown"), [("CMYK", (0, 0, 0, 255), 0), ("1", 1, 255), ("L", 77, 77)])
def test_other_modes_become_rgb(mode, colour, shown, tmp_path):
    assert decode_image(Image.new(mode, (2, 2), colour), "here", tmp_path).getpixel((1, 1)) == (shown,) * 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"not an image", "cannot be opened"),
        (png()[:40], "cannot be"),
        ("gone.png", "no image file .*gone.png"),
        ("data:image/png;base64,???", "the data URL does not hold valid base64"),
        ("words?", "'words\\?' is no file in .*, and does not hold valid base64"),
        ({"bytes": None, "path": None}, "an image is bytes, a path, .* this is an object of bytes, path"),
        ("https://example.org/a.png", "'https://example.org/a.png' is a web address, and none is fetched"),
        (5, "this is a int"),
    ],
)
def test_a_broken_image_is_named(tmp_path, value, message):
    with pytest.raises(ConfigError, match=f"x.parquet row 7: .*{message}"):
        decode_image(value, "x.parquet row 7", tmp_path)


def test_images_of_a_row_are_decoded_when_looked_at_and_travel(tmp_path):
    value = {"prompt": "<image>What?", "answer": "1", "images": [{"bytes": png(), "path": None}]}
    parquet.write_table(pyarrow.Table.from_pylist([value]), tmp_path / "x.parquet")
    (row,) = rows(tmp_path / "x.parquet", images="images")
    assert isinstance(row.images, Pictures) and row.fields == {}
    assert pickle.loads(pickle.dumps(row)) == row
    assert row.images[0].getpixel((0, 0)) == (10, 20, 30) and len(row.images[:1]) == 1


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_that_is_cut_is_named_when_the_rows_are_loaded(form, tmp_path):
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(stream, form)
    images = [base64.b64encode(stream.getvalue()[: 1800 if cut else None]).decode() for cut in (False, False, True, False)]
    path = jsonl(tmp_path, *({"prompt": "<image>What?", "answer": "1", "images": [image]} for image in images))
    config = DatasetConfig(path=str(path), options={"images": "images"})
    with pytest.raises(ConfigError, match=r"train\.jsonl:3: the image cannot be decoded"):
        ROWS.fitting(load_rows(config))
    assert len(ROWS.fitting(load_rows(config.model_copy(update={"max_rows": 2})))) == 2


def test_train_and_test_files_of_one_folder_are_never_mixed(tmp_path):
    for name in ("train", "test"):
        jsonl(tmp_path, {"prompt": name, "answer": "1"}, name=f"{name}-00000-of-00001.jsonl")
    with pytest.raises(ConfigError, match="holds the splits train and test; say which with the option split"):
        rows(tmp_path)
    assert [row.messages[0]["content"] for row in rows(tmp_path, split="test")] == ["test"]


def test_the_size_of_an_image_is_known_without_its_pixels(tmp_path):
    path = jsonl(tmp_path, {"prompt": "x", "answer": "1", "images": [base64.b64encode(png()).decode()] * 2})
    (row,) = rows(path, images="images")
    assert list(sizes(row.images)) == [image.size for image in row.images] == list(sizes(list(row.images))) == [(4, 3)] * 2
    assert list(sizes(row.images[1:])) == [(4, 3)]


def test_a_file_that_is_no_image_is_named_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.jsonl:1: no image file .*gone\.png"):
        list(rows(jsonl(tmp_path, {"prompt": "x", "answer": "1", "image": "gone.png"}), images="image"))


def test_load_rows_binds_options_and_keeps_the_first_rows(tmp_path):
    path = jsonl(tmp_path, *QUESTIONS)
    config = DatasetConfig(path=str(path), options={"instruction": "Now."}, max_rows=1)
    assert [row.messages[0]["content"] for row in load_rows(config)] == ["1+1? Now."]
    assert len(load_rows(DatasetConfig(name="rlcore.data.rows.rows", path=str(path)))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promt": "q"}, r"data\.eval\.options\.promt: no such setting; did you mean 'prompt'\?"),
        ({"prompt": 5}, r"data\.eval\.options\.prompt: .*it is 5"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        load_rows(DatasetConfig(path=str(jsonl(tmp_path, *QUESTIONS)), options=options), "data.eval")


def test_repeated_ids_are_named(tmp_path):
    path = jsonl(tmp_path, {**QUESTIONS[0], "id": "a"}, {**QUESTIONS[1], "id": "a"})
    with pytest.raises(ConfigError, match=r"data\.train: rows 1 and 2 have the id 'a'; ids must be unique"):
        ROWS.fitting(load_rows(DatasetConfig(path=str(path), options={"id": "id"})))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([{"prompt": "x"}], "gave a dict; a data set is a list of rlcore.types.Row"),
        ([Row("a", ASKED, answer=2)], ": answer of the row 'a' is a int; it must be a text"),
        ([Row(7, ASKED)], ": id of the row 7 is a int; it must be a text"),
        ([Row("a", ASKED, target="\ud83d")], r": target of the row 'a' holds \\ud83d, half of a surrogate pair"),
        ([Row("a", [{"role": "user", "content": "\ud83d"}])], r": messages of the row 'a' holds \\ud83d, half"),
    ],
)
def test_rows_that_a_function_of_ones_own_makes_wrong_are_named(made, said, monkeypatch):
    monkeypatch.setattr(registry, "load", lambda group, name: lambda path: made)
    with pytest.raises(ConfigError, match=f"data.train: 'own' ?{said}"):
        list(load_rows(DatasetConfig(name="own")))


def failing_rows(path):
    return [Row(str(number), ASKED) for number in (0, 1 / 0)]


def test_a_function_of_ones_own_that_fails_is_named_with_the_place():
    with pytest.raises(PluginError, match=r"data\.eval: '.*failing_rows' failed: ZeroDivisionError.* \(.*test_data\.py:\d+\)$"):
        load_rows(DatasetConfig(name=f"{__name__}.failing_rows"), "data.eval")


def no_rows(path):
    return []


def test_a_data_set_without_rows_is_named():
    with pytest.raises(ConfigError, match=r"data\.train: '.*no_rows' holds no rows"):
        load_rows(DatasetConfig(name=f"{__name__}.no_rows"))


@pytest.mark.parametrize(
    ("opening", "text", "twice"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>two</think> 2", "<think>"),
        ("<|Assistant|><think>", " \n<think>\ntwo", "<think>"),
        ("<|im_start|>assistant\n", "<|im_start|>assistant\n2", "<|im_start|>assistant"),
        ("ASSISTANT: ", "ASSISTANT: 2", "ASSISTANT:"),
        (" [/INST]", "[/INST]2", "[/INST]"),
    ],
)
def test_a_response_that_repeats_the_end_of_the_template_is_refused(opening, text, twice):
    with pytest.raises(ConfigError, match=re.escape(f"a:1: the target begins with {twice!r}, with which the chat template's")):
        check_opening(opening, text, "a:1", "target")


@pytest.mark.parametrize(
    ("opening", "text"),
    [
        ("<|im_start|>assistant\n", "<think>two</think> 2"), ("<|im_start|>assistant\n<think>\n", "two</think> 2"),
        ("<|im_start|>assistant\n<think>\n", "<thinking>"), ("assistant\n", "assistant professors"), ("A:", "A: Paris"),
        ("<think>", "> 2"), ("1 2", "2"), ("", "<think>"), ("user:", "ser: 5"),
    ],
)  # fmt: skip
def test_a_response_that_only_looks_like_the_end_of_the_template_is_not(opening, text):
    check_opening(opening, text, "a:1", "target")


def test_a_plan_tells_the_rows_that_are_too_long(models, tmp_path, capsys):
    short, long = {"prompt": "1+1?", "answer": "2"}, {"prompt": "long " * 100, "answer": "2"}
    data = {
        "train": {"path": str(jsonl(tmp_path, short, short))}, "max_prompt_tokens": 64,
        "eval": {"path": str(jsonl(tmp_path, short, long, short, long, name="held.jsonl"))},
    }  # fmt: skip
    file = write(tmp_path, resolve(ModelConfig(path="tiny_llama"), models), data=data, evaluation={"every": 1})
    assert main(["plan", str(file)]) == 0
    said = dict(re.findall(r"^(\w+ rows) +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert said["training rows"] == "2"
    assert said["evaluation rows"] == "2 (2 more are longer than data.max_prompt_tokens and dropped)"
    assert main(["plan", str(file), "data.long_prompts=refuse"]) == 2
    assert "held:2: 411 prompt tokens, the limit data.max_prompt_tokens is 64 (2 of 4 rows" in capsys.readouterr().err
