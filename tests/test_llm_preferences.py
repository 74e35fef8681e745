"""Preference files: what becomes of every kind of row, and what a file that is not one is told."""

import gzip
import itertools
import json
import random
import re
import sys
import types
from pathlib import Path

import pytest

from bdpo.llm import preferences as prefs
from bdpo.llm.language import Language
from bdpo.llm.preferences import PreferenceError, from_rows, read, turns

REAL = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf-harmless-base-test.jsonl.gz"


def human(text):
    return f"\n\nHuman: {text}"


def bot(text):
    return f"\n\nAssistant: {text}"


def hh(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


def pku(**more):
    return {
        "prompt": "Why?",
        "response_0": "Because.",
        "response_1": "No idea.",
        "is_response_0_safe": True,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    } | more


GOOD = hh(human("Hi") + bot("Hello."), human("Hi") + bot("Go away."))


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def dropped(*rows, **settings):
    """What is dropped of these rows beside a good one, which is kept."""
    good = GOOD if "chosen" in rows[0] and "prompt" not in rows[0] else pku() if "response_0" in rows[0] else EXPLICIT
    result = from_rows([*rows, good], **settings)
    assert (result.report.read, result.report.kept) == (len(rows) + 1, len(result)) == (len(rows) + 1, 1)
    return dict(result.report.dropped)


EXPLICIT = {"prompt": "Q", "chosen": "a", "rejected": "b"}


# --- transcripts ------------------------------------------------------------------------------------------------------


def one(row, **settings):
    result = from_rows([row], **settings)
    assert len(result) == 1
    return result


def test_a_transcript_is_split_at_its_last_turn():
    row = one(GOOD).rows[0]
    assert row == {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " Go away.", "line": 1}
    assert row["prompt"] + row["chosen"] == GOOD["chosen"]
    assert row["prompt"] + row["rejected"] == GOOD["rejected"]


def test_responses_that_begin_alike_keep_their_first_words():
    """A split at the longest common prefix of characters would give "I think" to the prompt."""
    row = one(hh(human("Hi") + bot("I think so."), human("Hi") + bot("I think not."))).rows[0]
    assert (row["chosen"], row["rejected"]) == (" I think so.", " I think not.")


def test_a_response_that_is_the_beginning_of_the_other():
    row = one(hh(human("Hi") + bot("Yes"), human("Hi") + bot("Yes, sir"))).rows[0]
    assert (row["chosen"], row["rejected"]) == (" Yes", " Yes, sir")


def test_transcripts_that_part_before_the_last_turn_leave_the_rest_in_the_response():
    row = hh(
        human("Hi") + bot("A") + human("Go on") + bot("B"),
        human("Hi") + bot("C") + human("Stop") + bot("D"),
    )
    result = one(row)
    assert result.rows[0]["prompt"] == human("Hi") + "\n\nAssistant:"
    assert result.rows[0]["chosen"] == " A" + human("Go on") + bot("B")
    assert result.report.notes["differ before the last turn"] == 1


def test_consecutive_turns_of_one_speaker_are_joined():
    result = one(hh(human("Hi") + human("there") + bot("A") + bot("B"), human("Hi\nthere") + bot("C")))
    assert result.rows[0]["prompt"] == human("Hi\nthere") + "\n\nAssistant:"
    assert result.rows[0]["chosen"] == " A\nB"
    assert result.report.notes["turns joined"] == 1


def test_an_empty_turn_beside_another_of_the_same_speaker_leaves_no_blank_lines():
    assert turns(human("Hi") + bot("") + bot("A")) == [("Human", "Hi"), ("Assistant", "A")]


@pytest.mark.parametrize(
    "text", ["Human: is a word", "I said\nHuman: no", "the Assistant: me", "a\n\nb\n\n\nc", "\n\n Human: x"]
)
def test_role_words_inside_the_text_and_blank_lines_are_text(text):
    row = one(hh(human("Hi") + bot(text), human("Hi") + bot("B"))).rows[0]
    assert row["chosen"] == " " + text.strip()


def test_a_text_that_begins_with_a_role_word_makes_no_new_turn_when_joined():
    joined = turns(human("Hi") + bot("A") + bot("Human: B"))
    assert joined == [("Human", "Hi"), ("Assistant", "A\nHuman: B")]


def test_turns_written_and_read_again_are_the_same_turns():
    rng = random.Random(0)
    pieces = ["\n\nHuman:", "\n\nAssistant:", "\nHuman:", "Human:", "Assistant: ", " ", "\n", "\n\n", "words", "\t"]
    for _ in range(3000):
        found = turns("\n\nHuman:" + "".join(rng.choices(pieces, k=rng.randint(0, 12))))
        assert turns(prefs._written(found)) == found
        assert all(a[0] != b[0] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("start", ["Human: Hi", "\nHuman: Hi", "\n\nHuman:Hi", "\n\n\n\nHuman:  Hi  "])
def test_the_beginning_of_a_transcript_may_be_sloppy(start):
    assert turns(start + bot("A")) == [("Human", "Hi"), ("Assistant", "A")]


def test_a_transcript_may_begin_with_the_assistant():
    row = one(hh(bot("Hi") + human("?") + bot("A"), bot("Hi") + human("?") + bot("B"))).rows[0]
    assert row["prompt"] == bot("Hi") + human("?") + "\n\nAssistant:"


def test_carriage_returns_and_unicode_line_separators_are_text():
    row = one(hh(human("Hi") + bot("a\u2028b\r\nc"), human("Hi") + bot("B"))).rows[0]
    assert row["chosen"] == " a\u2028b\r\nc"


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("empty response", hh(human("Hi") + "\n\nAssistant:", human("Hi") + bot("B"))),
        ("empty response", hh(human("Hi") + bot("A"), human("Hi") + bot(" \n "))),
        ("empty response", hh(human("Hi") + bot("A") + human("?") + bot(""), human("Hi") + bot("B"))),
        ("equal responses", hh(human("Hi") + bot("A"), human("Hi") + bot("A"))),
        ("equal responses", hh(human("Hi") + bot("A "), human("Hi") + bot(" A"))),
        ("human has the last word", hh(human("Hi") + bot("A") + human("?"), human("Hi") + bot("B"))),
        ("human has the last word", hh(human("Hi"), human("Ho"))),
        ("human turns differ", hh(human("Hi") + bot("A"), human("Ho") + bot("B"))),
        ("one transcript goes on", hh(human("Hi") + bot("A"), human("Hi") + bot("A") + human("?") + bot("B"))),
        ("empty prompt", hh(bot("A"), bot("B"))),
    ],
)
def test_a_pair_of_transcripts_that_cannot_be_compared_is_counted(reason, row):
    assert dropped(row) == {reason: 1}


@pytest.mark.parametrize("text", ["Hello there", "Question: Hi\n\nAssistant: A", ""])
def test_a_text_that_is_no_transcript_is_an_error(text):
    with pytest.raises(PreferenceError, match=r"rows, line 2: a transcript begins with"):
        from_rows([GOOD, hh(text, text + " !")])


def test_the_real_file_gives_the_documented_counts():
    if not REAL.exists():
        pytest.skip(f"the real preference file is not there: {REAL}")
    result = read(REAL, label="safe")
    assert result.report.form == "hh"
    assert (result.report.read, result.report.kept) == (2312, 2308)
    assert dict(result.report.dropped) == {"empty response": 4}
    assert dict(result.report.notes) == {"turns joined": 9, "longer response chosen": 1025}
    assert {1, 2, 2312} <= {row["line"] for row in result.rows}
    assert not {87, 517, 926, 1104} & {row["line"] for row in result.rows}


def test_the_real_file_by_another_route():
    """Joined back, a row without joined turns is the transcript, up to blanks around turns."""
    if not REAL.exists():
        pytest.skip(f"the real preference file is not there: {REAL}")
    with gzip.open(REAL, "rt", encoding="utf-8", newline="\n") as stream:
        raw = [json.loads(line) for line in stream]
    same = 0
    for row in read(REAL).rows:
        for side in ("chosen", "rejected"):
            assert row["prompt"].endswith("\n\nAssistant:")
            assert row[side].startswith(" ")
            assert "\n\nHuman:" not in row[side]
            same += (row["prompt"] + row[side]).split() == raw[row["line"] - 1][side].split()
    # joined: 8 and 5 transcripts, one pair of them with both; a joined turn loses its second mark
    assert 2 * 2308 - same == 8 + 5


# --- PKU-SafeRLHF -----------------------------------------------------------------------------------------------------


def test_the_label_chooses_the_response():
    assert one(pku(), label="helpful").rows[0]["chosen"] == "Because."
    assert one(pku(), label="safe").rows[0]["chosen"] == "No idea."
    assert one(pku(overall_response_id=1), label="overall").rows[0]["chosen"] == "No idea."


def test_flags_of_safety_go_with_their_responses():
    row = one(pku(is_response_0_safe=False), label="safe").rows[0]
    assert (row["chosen_safe"], row["rejected_safe"]) == (True, False)
    assert "chosen_safe" not in one(pku(is_response_0_safe=None), label="safe").rows[0]


@pytest.mark.parametrize("null", [None, float("nan")])
def test_a_null_label_is_counted(null):
    assert dropped(pku(better_response_id=null), label="helpful") == {"no label": 1}


def test_a_safer_label_against_the_flags_is_counted_for_this_label_only():
    row = pku(is_response_0_safe=True, is_response_1_safe=False, safer_response_id=1)
    assert dropped(row, label="safe") == {"label against flags": 1}
    assert one(row, label="helpful").rows[0]["rejected_safe"] is False


@pytest.mark.parametrize(
    ("reason", "more"),
    [
        ("empty response", {"response_1": " \n"}),
        ("equal responses", {"response_1": "Because. "}),
        ("empty prompt", {"prompt": ""}),
    ],
)
def test_a_pair_without_two_responses_and_a_prompt_is_counted(reason, more):
    assert dropped(pku(**more), label="helpful") == {reason: 1}


def test_every_drop_is_counted_once():
    rows = [pku(better_response_id=None), pku(response_0=""), pku(response_0=""), pku(prompt="")]
    report = from_rows([*rows, pku()], label="helpful").report
    assert dict(report.dropped) == {"no label": 1, "empty response": 2, "empty prompt": 1}
    assert report.read == report.kept + sum(report.dropped.values())


def test_the_safe_rlhf_form_needs_a_label():
    with pytest.raises(PreferenceError, match="several labels; choose the label 'helpful' or 'safe'"):
        from_rows([pku()])


def test_a_label_that_the_file_does_not_have():
    with pytest.raises(PreferenceError, match=r"no column overall_response_id .* has 'helpful' or 'safe'"):
        from_rows([pku()], label="overall")
    bare = {key: value for key, value in pku().items() if not key.endswith("_id")}
    with pytest.raises(PreferenceError, match="this file has no column of labels"):
        from_rows([bare], label="safe")


@pytest.mark.parametrize("pick", [2, -1, "0", 0.5])
def test_a_label_that_names_no_response_is_an_error(pick):
    with pytest.raises(PreferenceError, match=r"line 1: better_response_id is .*; allowed: 0, 1, or null"):
        from_rows([pku(better_response_id=pick)], label="helpful")


def test_a_label_column_that_a_later_row_lacks_is_an_error():
    short = {key: value for key, value in pku().items() if key != "better_response_id"}
    with pytest.raises(PreferenceError, match=r"line 2: .*better_response_id"):
        from_rows([pku(), short], label="helpful")


def test_an_older_file_without_flags_is_read():
    old = {key: value for key, value in pku().items() if not key.startswith("is_")}
    assert set(one(old, label="safe").rows[0]) == {"prompt", "chosen", "rejected", "line"}


@pytest.mark.parametrize("label", prefs.LABELS)
def test_pairs_of_the_language_lose_no_row(label):
    rows = Language().pairs(200, 0)
    result = from_rows(rows, label=label)
    assert result.report.kept == 200
    for row, pair in zip(result.rows, rows, strict=True):
        pick = pair[prefs.LABELS[label]]
        assert row["chosen"] == pair[f"response_{pick}"]
        assert (row["chosen_help"], row["rejected_harm"]) == (pair[f"help_{pick}"], pair[f"harm_{1 - pick}"])
        assert row["chosen_safe"] is pair[f"is_response_{pick}_safe"]


# --- explicit prompts and the choice of a form ------------------------------------------------------------------------


def test_explicit_prompts_are_taken_as_they_are():
    assert one({"prompt": " Q ", "chosen": "a ", "rejected": " b"}).rows[0] == {
        "prompt": " Q ", "chosen": "a ", "rejected": " b", "line": 1
    }  # fmt: skip


def test_explicit_pairs_are_counted_like_others():
    rows = [EXPLICIT | {"chosen": ""}, EXPLICIT | {"chosen": "b"}, EXPLICIT | {"prompt": "\n"}]
    assert dropped(*rows) == {"empty response": 1, "equal responses": 1, "empty prompt": 1}


def test_the_columns_tell_the_form():
    forms = [from_rows([row], label="safe").report.form for row in (GOOD, pku(), EXPLICIT)]
    assert forms == ["hh", "safe-rlhf", "explicit"]


def test_a_form_may_be_demanded():
    assert one(GOOD | {"prompt": "p"}, form="hh").rows[0]["prompt"] == "\n\nHuman: Hi\n\nAssistant:"
    with pytest.raises(PreferenceError, match="no column prompt, which the form explicit has"):
        from_rows([GOOD], form="explicit")
    with pytest.raises(PreferenceError, match="form is 'csv'; allowed: 'hh', 'safe-rlhf' or 'explicit'"):
        from_rows([GOOD], form="csv")


def test_messages_instead_of_text_are_an_error():
    chat = {"prompt": [{"role": "user", "content": "Q"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(PreferenceError, match=r"line 1: prompt is \[\{'role'.*it must be a text"):
        from_rows([chat])


def test_the_report_reads_well_and_is_plain_data():
    report = from_rows([pku(), pku(response_0="")], label="helpful", name="few").report
    assert str(report).splitlines() == [
        "few (safe-rlhf, label helpful): 2 pairs read, 1 kept",
        "  dropped 1: empty response (one of the responses has no words)",
    ]
    assert json.loads(json.dumps(report.as_dict()))["dropped"] == {"empty response": 1}


# --- files ------------------------------------------------------------------------------------------------------------


def test_json_lines_gzip_and_parquet_give_the_same_rows(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [pku(), pku(prompt="Wie spät? ✓", better_response_id=None), pku(prompt="a\u2028b", response_0="x\ny")]
    plain = jsonl(tmp_path / "rows.jsonl", *rows)
    packed = tmp_path / "rows.data"  # the first bytes decide, not the name
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    first, *others = (read(path, label="helpful") for path in (plain, packed, tmp_path / "rows.parquet"))
    assert [row["prompt"] for row in first.rows] == ["Why?", "a\u2028b"]
    assert all(other.rows == first.rows for other in others)
    assert all(other.report.dropped == first.report.dropped for other in others)


def test_lines_are_those_of_the_file_blank_ones_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", GOOD, "", GOOD)
    assert [row["line"] for row in read(path).rows] == [1, 3]
    assert read(str(path)).report.source == str(path)


def test_a_limit_stops_early(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", GOOD, GOOD, "not JSON")
    assert len(read(path, limit=2)) == 2
    with pytest.raises(PreferenceError, match="limit is 0"):
        read(path, limit=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "no pairs in it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS.*git lfs pull"),
        (b'{"chosen": "a"\n', "line 1: no JSON"),
        (json.dumps(GOOD).encode() + b"\nchosen,rejected\n", "line 2: no JSON"),
        (b"[1, 2]\n", "line 1: .* is no JSON object"),
        (b'{"text": "a"}\n', "line 1: the columns are text; expected hh: chosen, rejected; safe-rlhf"),
        (b"{}\n", "line 1: the columns are none"),
        (b'{"chosen": "\xff"}\n', "not UTF-8"),
        (gzip.compress(json.dumps(GOOD).encode() * 100)[:-20], "cannot be read on"),
        (b"PAR1 and no more", "no readable Parquet"),
        (json.dumps(hh(human("Hi") + bot(""), human("Hi") + bot("B"))).encode(), "no pair of the file can be trained"),
        (json.dumps(GOOD | {"chosen": None}).encode(), "line 1: chosen is None; it must be a text"),
    ],
)
def test_a_file_that_is_not_one_is_told_what_and_where(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(PreferenceError, match=f"(?s){message}") as caught:
        read(path)
    assert "bad.jsonl" in str(caught.value)


def test_a_missing_file_a_folder_and_a_wrong_label(tmp_path):
    with pytest.raises(PreferenceError, match=r"nowhere.jsonl: no such file; give a .jsonl"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(PreferenceError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(PreferenceError, match="label is 'better'; allowed: 'helpful', 'safe' or 'overall'"):
        read(tmp_path / "nowhere.jsonl", label="better")


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stands for the package ``datasets``: remembers the calls, answers from a table."""
    calls = []

    def load_dataset(name, **settings):
        calls.append((name, settings))
        answer = table[name, settings.get("data_dir")]
        if isinstance(answer, Exception):
            raise answer
        return answer

    table = {}
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return types.SimpleNamespace(calls=calls, table=table)


def test_hh_takes_the_folders_of_the_label_and_never_remote_code(hub):
    for number, folder in enumerate(prefs.HH_FOLDERS["overall"]):
        hub.table["Anthropic/hh-rlhf", folder] = [hh(human(f"{number}") + bot("A"), human(f"{number}") + bot("B"))]
    assert "0" in read("hh", label="safe", split="test").rows[0]["prompt"]
    assert hub.calls == [("Anthropic/hh-rlhf", {"data_dir": "harmless-base", "split": "test"})]
    assert len(read("hh", label="helpful")) == 3
    overall = read("hh", label="overall")
    assert [row["line"] for row in overall.rows] == [1, 2, 3, 4]
    assert not any("trust_remote_code" in settings for _, settings in hub.calls)
    with pytest.raises(PreferenceError, match="label is None; choose 'helpful', 'safe' or 'overall'"):
        read("hh")


def test_safe_rlhf_of_the_hub(hub):
    hub.table["PKU-Alignment/PKU-SafeRLHF", None] = [pku(), pku(safer_response_id=None)]
    result = read("safe-rlhf", label="safe", limit=2)
    assert result.report.as_dict()["dropped"] == {"no label": 1}
    assert result.report.source == "PKU-Alignment/PKU-SafeRLHF train"


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (ConnectionError("no route"), "cannot be loaded from the hub .*no route.*path of a local"),
        (ValueError('Unknown split "dev"'), "no split 'dev'"),
    ],
)
def test_a_hub_that_cannot_be_reached_says_what_to_do(hub, problem, message):
    hub.table["PKU-Alignment/PKU-SafeRLHF", None] = problem
    with pytest.raises(PreferenceError, match=message):
        read("safe-rlhf", label="safe", split="dev")


def test_the_real_package_without_a_network(monkeypatch, tmp_path):
    """Offline, ``datasets`` itself fails; the message is ours."""
    import subprocess

    code = (
        "from bdpo.llm.preferences import PreferenceError, read\n"
        "try:\n    read('safe-rlhf', label='safe')\n"
        "except PreferenceError as error:\n    print(error)"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search("PKU-Alignment/PKU-SafeRLHF cannot be loaded from the hub", run.stdout)
    assert "give the path of a local" in run.stdout


def test_local_files_of_the_hubs_form_through_the_real_package(monkeypatch, tmp_path):
    """The hub's loading code on folders laid out as on the hub."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "harmless-base").mkdir()
    packed = gzip.compress((json.dumps(GOOD) + "\n").encode())
    (tmp_path / "harmless-base" / "test.jsonl.gz").write_bytes(packed)
    monkeypatch.setitem(prefs.HUB, "hh", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert read("hh", label="safe", split="test").rows == from_rows([GOOD]).rows
