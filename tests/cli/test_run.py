"""``gossamer run`` on a tiny random model: answers, numbers, and one clear line for every bad input."""

import io
import json
import shutil
from pathlib import Path

import pytest
from notes import without_notes

from gossamer import Profile
from gossamer.backends import cpu
from gossamer.cli import main
from gossamer.methods import AShape, Dense, MaxRelative
from gossamer.methods.seer_gates import LayerGate, SeerGates
from gossamer.profiles import write_duo

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

SPARSE = ["--method", "a_shape", "--set", "sink=8", "--set", "window=32", "--min-tokens", "0"]


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["run", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_streams_the_answer_to_stdout_and_figures_to_stderr(capsys, model_path, prompt_file):
    code, out, err = run(capsys, model_path, prompt_file, *SPARSE, "--max-new-tokens", 5)
    assert code == 0
    assert len(out.split()) == 5
    assert "density 0." in err


def test_json_is_one_object_with_the_figures_of_the_prefill(capsys, model_path, prompt_file):
    code, out, _ = run(capsys, model_path, prompt_file, *SPARSE, "--max-new-tokens", 3, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["prompt_tokens"] == 300
    assert data["method"] == {"method": "a_shape", "sink": 8, "window": 32}
    assert 0 < data["density"] < 0.5
    assert len(data["tokens"]) == 3
    assert data["prefill_seconds"] > data["attention_seconds"] > 0


def test_new_tokens_read_what_a_method_chooses(capsys, model_path, prompt_file):
    steps = ["--method", "dense", "--decode", "quest(budget=64,dense_layers=0)", "--cache", "keep(sinks=4)"]
    code, out, _ = run(capsys, model_path, prompt_file, *steps, "--max-new-tokens", 3, "--json", "--compare")
    data = json.loads(out)
    assert code == 0
    assert data["decode"]["method"] == "quest"
    assert data["cache"] == {"cache": "keep", "sinks": 4, "recent": 0}
    assert 0.1 < data["step_density"] < 0.3
    assert data["dense"]["step_density"] is None
    assert "quest needs store" not in data["dense_because"]
    code, _, err = run(capsys, model_path, prompt_file, *steps, "--max-new-tokens", 3)
    assert code == 0
    assert "which read 0." in err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--decode", "a_shape"], "must be a method that chooses what a decode step reads"),
        (["--decode", "nonesuch"], "unknown method 'nonesuch'"),
        (["--cache", "nonesuch"], "unknown cache 'nonesuch'"),
        (["--cache", "keep(size=3)"], "cache 'keep' has no field 'size'"),
    ],
)
def test_what_cannot_be_read_or_kept_is_one_line(capsys, model_path, prompt_file, option, message):
    code, out, err = run(capsys, model_path, prompt_file, *option)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_compare_adds_a_dense_run(capsys, model_path, prompt_file):
    code, out, _ = run(capsys, model_path, prompt_file, *SPARSE, "--max-new-tokens", 3, "--json", "--compare")
    data = json.loads(out)
    assert code == 0
    assert data["dense"]["density"] == 1.0
    assert 0 <= data["top1_agreement"] <= 1


def test_compare_prints_a_table(capsys, model_path, prompt_file):
    code, _, err = run(capsys, model_path, prompt_file, *SPARSE, "--max-new-tokens", 3, "--compare")
    lines = [line.split() for line in err.splitlines()]
    assert code == 0
    assert [line[0] for line in lines if line and line[0] in ("a_shape", "dense")] == ["a_shape", "dense"]


def test_a_method_that_drops_nothing_agrees_with_dense(capsys, model_path, prompt_file):
    # Whole prompt in the window: the same function up to rounding.
    argv = ["--method", "a_shape", "--min-tokens", 0, "--max-new-tokens", 4, "--json", "--compare"]
    code, out, _ = run(capsys, model_path, prompt_file, *argv, "--dtype", "float32")
    data = json.loads(out)
    assert code == 0
    assert data["tokens"] == data["dense"]["tokens"]
    assert data["top1_agreement"] == 1.0


def test_reads_the_prompt_from_standard_input(capsys, model_path, prompt_file, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt_file.read_text()))
    code, out, _ = run(capsys, model_path, *SPARSE, "--max-new-tokens", 1, "--json")
    assert code == 0
    assert json.loads(out)["prompt_tokens"] == 300


def test_says_why_a_short_prompt_ran_dense(capsys, model_path, prompt_file):
    code, out, _ = run(capsys, model_path, prompt_file, "--max-new-tokens", 1, "--json")
    assert code == 0
    assert json.loads(out)["dense_because"] == {"short prompt": 2}


def test_a_filter_shortens_the_prompt(capsys, model_path, prompt_file):
    argv = ["--method", "a_shape", "--min-tokens", 0, "--max-new-tokens", 2, "--filter", "1:40"]
    code, out, _ = run(capsys, model_path, prompt_file, *argv, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["prompt_tokens"] == 300
    assert (data["filter"]["layer"], data["filter"]["tokens"]) == (1, 40)
    assert data["prefill_seconds"] > data["filter"]["seconds"] > 0
    code, out, err = run(capsys, model_path, prompt_file, *argv, "--compare")
    assert code == 0
    assert "layer 1 kept 40 of 300 tokens" in err
    rows = {line.split()[0]: line.split() for line in err.splitlines() if line.startswith(("a_shape", "dense"))}
    assert rows["a_shape"][5] == rows["dense"][5] == "-"  # positions of two prompts are not compared
    assert rows["a_shape"][6] in ("0/2", "1/2", "2/2")


def test_a_filter_keeps_the_tokens_that_the_layer_says(capsys, model_path, prompt_file, tmp_path):
    """The answer is that to the kept words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gossamer.integrations.transformers import filter_prompt

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    ids = tokenizer(prompt_file.read_text(), return_tensors="pt")["input_ids"]
    kept = tmp_path / "kept.txt"
    kept.write_text(tokenizer.decode(filter_prompt(model.eval(), ids, 0, 25)[0]))
    argv = ["--method", "dense", "--max-new-tokens", 6, "--json"]
    answers = [
        json.loads(run(capsys, model_path, *rest, *argv)[1])["tokens"]
        for rest in ((kept,), (prompt_file, "--filter", "0:25"), (prompt_file,))
    ]
    assert answers[0] == answers[1] != answers[2]


def bad(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a bad command line gives."""
    code, out, err = run(capsys, *argv)
    err = without_notes(err)
    assert (code, out) == (2, "")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


def test_missing_model(capsys, tmp_path, prompt_file):
    assert "no such model" in bad(capsys, tmp_path / "nowhere", prompt_file)


def test_folder_that_is_not_a_model(capsys, tmp_path, prompt_file):
    assert "is not a model" in bad(capsys, tmp_path, prompt_file)


@pytest.mark.parametrize("config", ["{", "[]", "{}"])
def test_config_that_is_not_a_model(capsys, tmp_path, prompt_file, config):
    (tmp_path / "config.json").write_text(config)
    assert "model" in bad(capsys, tmp_path, prompt_file)


def test_model_without_tokenizer(capsys, tmp_path, model_path, prompt_file):
    shutil.copy(model_path / "config.json", tmp_path)
    assert "no tokenizer" in bad(capsys, tmp_path, prompt_file)


def test_model_without_weights(capsys, tmp_path, model_path, prompt_file):
    shutil.copytree(model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    assert "can load" in bad(capsys, tmp_path, prompt_file)


def test_damaged_weights(capsys, tmp_path, model_path, prompt_file):
    shutil.copytree(model_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert "can load" in bad(capsys, tmp_path, prompt_file)


def test_missing_prompt_file(capsys, model_path, tmp_path):
    assert "no such prompt file" in bad(capsys, model_path, tmp_path / "nothing.txt")


def test_prompt_file_that_is_a_folder(capsys, model_path, tmp_path):
    assert "cannot read the prompt file" in bad(capsys, model_path, tmp_path)


def test_prompt_file_that_is_not_text(capsys, model_path, tmp_path):
    file = tmp_path / "image.bin"
    file.write_bytes(b"\xff\xfe\x00\x81")
    assert "not UTF-8" in bad(capsys, model_path, file)


def test_empty_prompt(capsys, model_path, tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text("\n")
    assert "empty" in bad(capsys, model_path, file)


def test_prompt_longer_than_the_model_allows(capsys, model_path, prompt_file):
    line = bad(capsys, model_path, prompt_file, "--max-new-tokens", 725)
    assert "300 tokens and 725 new ones, but this model takes 1024" in line


def test_unknown_method_lists_the_known_ones(capsys, model_path, prompt_file):
    line = bad(capsys, model_path, prompt_file, "--method", "magic")
    assert "'magic'" in line
    assert "minference" in line
    assert "max_relative" in line


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("sinks=1", "its fields are: sink, window"),
        ("sink=many", "a_shape.sink takes int"),
        ("sink", "FIELD=VALUE"),
        ("sink=-1", "at least 0"),
    ],
)
def test_bad_field(capsys, model_path, prompt_file, setting, expected):
    assert expected in bad(capsys, model_path, prompt_file, "--method", "a_shape", "--set", setting)


def test_missing_profile(capsys, model_path, prompt_file, tmp_path):
    assert "cannot read the profile" in bad(capsys, model_path, prompt_file, "--profile", tmp_path / "none.json")


def test_file_that_is_no_profile(capsys, model_path, prompt_file):
    assert "is not JSON" in bad(capsys, model_path, prompt_file, "--profile", prompt_file)


def test_profile_of_another_model(capsys, model_path, prompt_file, tmp_path):
    Profile.uniform(3, 8, Dense()).save(tmp_path / "profile.json")
    line = bad(capsys, model_path, prompt_file, "--profile", tmp_path / "profile.json", "--min-tokens", 0)
    assert "3 layers of 8 heads" in line


@pytest.fixture
def profile(tmp_path):
    """Two kinds of heads for the model of these tests."""
    layer = (AShape(8, 32), MaxRelative(last_rows=0), AShape(4, 300), AShape(8, 32))
    Profile((layer, layer)).save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


@pytest.mark.parametrize("named", [(), ("--method", "minference"), ("--method", "per_head")])
def test_a_profile_gives_each_head_its_method(capsys, model_path, prompt_file, profile, named):
    argv = [*named, "--profile", profile, "--min-tokens", 0, "--max-new-tokens", 1, "--json"]
    code, out, err = run(capsys, model_path, prompt_file, *argv)
    assert code == 0, err
    data = json.loads(out)
    assert data["dense_because"] == {}
    assert data["density"] < 0.9
    assert (data["method"]["method"], data["profile"]) == ("per_head", "profile.json")
    assert data["method"]["layers"][1][0] == {"method": "a_shape", "sink": 8, "window": 32}


@pytest.mark.parametrize("name", ["profile.json", "dense"])
def test_the_table_names_the_profile(capsys, model_path, prompt_file, profile, name):
    profile = profile.rename(profile.with_name(name))
    argv = ["--profile", profile, "--min-tokens", 0, "--max-new-tokens", 1, "--compare"]
    code, _, err = run(capsys, model_path, prompt_file, *argv)
    assert code == 0, err
    rows = [line.split() for line in err.splitlines() if line.startswith((name, "dense"))]
    assert [row[0] for row in rows] == [name, "dense"]
    assert float(rows[0][3]) < float(rows[1][3]) == 1.0
    assert "minference" not in err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--method", "a_shape"], "--profile is for the methods minference, per_head; name one of them"),
        (["--set", "slash_size=64"], "leave slash_size of minference out"),
    ],
)
def test_what_does_not_go_with_a_profile(capsys, model_path, prompt_file, profile, argv, expected):
    assert expected in bad(capsys, model_path, prompt_file, "--profile", profile, *argv)


def test_methods_per_head_need_a_profile(capsys, model_path, prompt_file):
    assert "give a file of them by --profile" in bad(capsys, model_path, prompt_file, "--method", "per_head")
    line = bad(capsys, model_path, prompt_file, "--method", "per_head", "--set", "layers=[]")
    assert "use --profile FILE" in line


def test_chat_without_a_template(capsys, model_path, prompt_file):
    assert "no chat template" in bad(capsys, model_path, prompt_file, "--chat")


@pytest.mark.skipif(not cpu.is_available(), reason="no C++ kernels to choose from")
def test_unknown_instruction_set_lists_the_known_ones(capsys, model_path, prompt_file, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CPU_ISA", "vax")
    assert "portable" in bad(capsys, model_path, prompt_file)


@pytest.mark.parametrize("variable", ["GOSSAMER_BACKEND", "GOSSAMER_PLANNER"])
def test_unknown_backend_lists_the_known_ones(capsys, model_path, prompt_file, monkeypatch, variable):
    monkeypatch.setenv(variable, "reference")
    assert f"{variable}='reference' is not known; use one of: torch, cpu" in bad(capsys, model_path, prompt_file)


def test_unknown_option(capsys, model_path, prompt_file):
    assert "--fast" in bad(capsys, model_path, prompt_file, "--fast")


def test_no_new_tokens(capsys, model_path, prompt_file):
    assert "at least 1" in bad(capsys, model_path, prompt_file, "--max-new-tokens", 0)


def test_model_path_stays_in_the_message(capsys, prompt_file):
    assert "meta/some-name" in bad(capsys, Path("meta/some-name"), prompt_file)


@pytest.mark.parametrize("text", ["3", "a:5", "1:", ":4", "1:0", "-1:4", "1:2:3", "1.5:2", "1:" + 5000 * "9"])
def test_a_filter_that_is_none_is_explained(capsys, model_path, prompt_file, text):
    assert "--filter takes LAYER:KEEP" in bad(capsys, model_path, prompt_file, f"--filter={text}")


def test_a_filter_by_a_layer_that_is_not_there(capsys, model_path, prompt_file):
    line = bad(capsys, model_path, prompt_file, "--filter", "2:40")
    assert "--filter: layer must be at least 0 and below 2" in line


def test_numbers_by_head_must_be_there_and_be_for_this_model(capsys, model_path, prompt_file, tmp_path):
    argv = [model_path, prompt_file, "--method", "duo_attention", "--set"]
    assert "duo_attention has no gates" in bad(capsys, *argv, "sink=3")
    message = "gates is for 1 layers of 3 heads, but this model has 2 layers of 4 (2 for keys and values)"
    assert message in bad(capsys, *argv, "gates=[[1,2,3]]")
    assert message.replace("1 layers of 3", "2 layers of 3") in bad(capsys, *argv, "gates=[[1,2,3],[1,2,3]]")
    write_duo(tmp_path, [[0.5, 1.0], [0.2, 0.7]], sink=1, recent=2)
    few = ["--set", "sink=4", "--set", "recent=16", "--min-tokens", 0, "--max-new-tokens", 1, "--json"]
    code, out, _ = run(capsys, *argv, f"gates=@{tmp_path}", *few)
    assert code == 0
    assert 0.5 < json.loads(out)["density"] < 0.7


def test_gates_that_cannot_be_used_are_one_line(capsys, model_path, prompt_file, tmp_path):
    argv = [model_path, prompt_file, "--method", "seer_attention", "--min-tokens", 0, "--max-new-tokens", 1, "--set"]
    assert "cannot read the gates" in bad(capsys, *argv, f"gates={tmp_path}/nowhere")
    (tmp_path / "gates").write_text("none")
    assert "cannot be read as safetensors" in bad(capsys, *argv, f"gates={tmp_path}/gates")
    SeerGates([LayerGate.untrained(3, 8)] * 2).save(tmp_path / "gates")
    assert "are for 3 heads of 8 channels" in bad(capsys, *argv, f"gates={tmp_path}/gates")


def test_a_model_whose_rotary_embedding_cannot_be_undone_is_one_line(capsys, model_path, prompt_file, tmp_path):
    shutil.copytree(model_path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "change with the length" in bad(capsys, tmp_path, prompt_file, "--method", "seer_attention")
