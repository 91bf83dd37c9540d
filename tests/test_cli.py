"""The command line: what comes out on which stream, and how wrong input ends."""

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import jaxsd
from jaxsd import models
from jaxsd.cli import generate, info, main, pair, prompts, train
from jaxsd.models import checkpoint, corpus

CONFIG = dataclasses.replace(
    models.CONFIGS["tiny"], vocab_size=257, d_model=16, n_layers=1, d_ff=16, head_dim=4
)
# SDSL, arXiv 2603.11053, table 5: LLaMa3-70B with OPT drafts.
LLAMA3_70B = ("--target-params", "70553706496", "--target-tokens", "15e12")


def random_params(config, seed):
    """Weights without the compilation that `init_params` takes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape).astype(np.float32)),
        models.abstract_params(config),
    )


def save(folder, seed, tokenizer=None):
    tokenizer = tokenizer or corpus.ByteTokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    checkpoint.save_model(folder, config, random_params(config, seed), tokenizer, dtype="float32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a random pair, and of models with one thing wrong each."""
    root = tmp_path_factory.mktemp("models")
    save(root / "target", 0)
    save(root / "draft", 1)
    save(root / "other-tokenizer", 2, corpus.train_bpe(["some words, some more words"], 260))
    for name in ("truncated", "corrupt", "nan", "no-tokenizer"):
        shutil.copytree(root / "target", root / name)
    weights = root / "truncated" / checkpoint.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    weights = root / "corrupt" / checkpoint.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    put_nan(root / "nan")
    (root / "no-tokenizer" / corpus.TOKENIZER_FILE).unlink()
    return root


def put_nan(folder):
    """Breaks a weight and makes the checksum agree, as if training had written it so."""
    weights, config = folder / checkpoint.WEIGHTS_FILE, folder / checkpoint.CONFIG_FILE
    tensors = safetensors.numpy.load(weights.read_bytes())
    tensors["embedding"] = tensors["embedding"].copy()
    tensors["embedding"][0, 0] = np.nan
    data = safetensors.numpy.save(tensors)
    content = json.loads(config.read_text(encoding="utf-8"))
    content["weights"] |= {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    weights.write_bytes(data)
    config.write_text(json.dumps(content), encoding="utf-8")


GENERATE = ("generate", "--target", "{root}/target", "--draft", "{root}/draft", "--prompt", "a b")
WRONG = {
    "missing folder": (("generate", "--target", "{root}/none", "--draft", "{root}/draft"), "none"),
    "missing draft": (("generate", "--target", "{root}/target"), "--draft"),
    "truncated": (("generate", "--target", "{root}/truncated", "--draft", "{root}/draft"), "bytes"),
    "corrupt": (("generate", "--target", "{root}/target", "--draft", "{root}/corrupt"), "corrupt"),
    "nan": (("generate", "--target", "{root}/target", "--draft", "{root}/nan"), "not finite"),
    "no tokenizer": (
        ("generate", "--target", "{root}/no-tokenizer", "--draft", "{root}/draft"),
        "tokenizer",
    ),
    "wrong tokenizer": (
        ("generate", "--target", "{root}/target", "--draft", "{root}/other-tokenizer"),
        "different tokenizers",
    ),
    "K = 0": ((*GENERATE, "--num-draft-tokens", "0"), "--plain"),
    "K = 0, lookup": (
        (*GENERATE, "--drafter", "prompt-lookup", "--num-draft-tokens", "0"),
        "--plain",
    ),
    "K without drafter": ((*GENERATE, "--plain", "--num-draft-tokens", "2"), "needs a drafter"),
    "max_len": ((*GENERATE, "--max-len", "3"), "max_len=3 must exceed the prompt's 3 tokens"),
    "no new tokens": ((*GENERATE, "--max-new-tokens", "0"), "max_new_tokens=0"),
    "temperature": ((*GENERATE, "--temperature", "-0.5"), "temperature=-0.5"),
    "nan temperature": ((*GENERATE, "--temperature", "nan"), "temperature=nan"),
    "top_p": ((*GENERATE, "--top-p", "1.5"), "top_p=1.5"),
    "seed": ((*GENERATE, "--seed", str(10**30)), ""),
    "two prompts": ((*GENERATE, "--prompt-file", "x"), "exclude"),
    "prompt file": (("generate", "--prompt-file", "{root}/no.txt"), "no.txt"),
    "prompt file is no text": (
        ("generate", "--prompt-file", "{root}/corrupt/" + checkpoint.WEIGHTS_FILE),
        "UTF-8",
    ),
    "prompt is no text": (("generate", "--prompt", "\udcff"), "UTF-8"),
    "json folder": (("info", "--json", "{root}/none/x.json"), "json="),
    "demo K = 0": (("demo", "--num-draft-tokens", "0"), "num_draft_tokens=0"),
    "demo runs": (("demo", "--runs", "0"), "runs=0"),
    "demo prompts": (
        ("demo", "--target", "{root}/target", "--draft", "{root}/draft", "--prompts", "{root}/no"),
        "prompts",
    ),
    "design": (
        ("design", *LLAMA3_70B[:2], "--target-tokens", "-1", "--draft-tokens", "1T"),
        "target_tokens=-1",
    ),
    "train config": (("train", "--out", "{root}/run", "--config", "huge"), "huge"),
}


@pytest.mark.parametrize(("argv", "named"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_exit_status_2(argv, named, folders, capsys):
    assert main.main([word.format(root=folders) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxsd: error: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("demo", "--bogus", "3"), "--bogus"),
        (("generate", "--drafter", "nobody"), "nobody"),
        (("design", *LLAMA3_70B, "--draft-tokens", "70x"), "--draft-tokens: '70x'"),
        (("design", *LLAMA3_70B), "--draft-tokens"),
        (("nothing",), "nothing"),
    ],
    ids=str,
)
def test_arguments_that_do_not_parse_are_named_and_exit_status_2(argv, named, capsys):
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert "Traceback" not in err


@pytest.mark.parametrize("argv", [(), ("--help",)], ids=str)
def test_help_names_every_command(argv, capsys):
    assert main.main(argv) == 0
    out = capsys.readouterr().out
    assert [name for name in main.COMMANDS if f"• {name} " not in out] == []


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_of_a_command_explains_every_option(command, capsys):
    assert main.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json FILE" in out
    assert " (default" not in [line[:9] for line in out.splitlines()]


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxsd {jaxsd.__version__}\n"


def test_a_traceback_is_shown_on_demand(monkeypatch):
    monkeypatch.setenv(main.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="runs=0"):
        main.main(["demo", "--runs", "0"])


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)], ids=str
)
def test_an_interruption_is_quiet(error, status, monkeypatch, capsys):
    def interrupted() -> dict:
        raise error

    monkeypatch.setattr(info, "info", interrupted)
    monkeypatch.setattr(main, "_discard_stdout", lambda: None)
    assert main.main(["info"]) == status
    assert capsys.readouterr() == ("", "")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def buggy() -> dict:
        raise TypeError("a bug")

    monkeypatch.setattr(info, "info", buggy)
    with pytest.raises(TypeError, match="a bug"):
        main.main(["info"])


def test_json_holds_arrays_and_numbers_that_are_not_finite(monkeypatch, capsys):
    def odd() -> dict:
        print("not JSON")
        numbers = {"array": np.arange(2), "jax": jax.numpy.float32(0.5), "inf": float("inf")}
        return numbers | {"tuple": (1, float("nan"))}

    monkeypatch.setattr(info, "info", odd)
    assert main.main(["info", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"array": [0, 1], "jax": 0.5, "inf": None, "tuple": [1, None]}
    assert err == "not JSON\n"


def test_json_of_design_is_table_5_of_sdsl_and_alone_on_stdout(capsys):
    assert main.main(["design", *LLAMA3_70B, "--draft-tokens", "180B", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["draft_parameters"] == pytest.approx(312760391.8, rel=1e-6)
    assert result["throughput"] == pytest.approx(1.916e-11, rel=5e-4)  # four printed digits
    assert result["speedup"] == pytest.approx(result["throughput"] * 2 * 70553706496)
    assert result["whole"]["gamma"] in (int(result["gamma"]), int(result["gamma"]) + 1)
    assert 0 < result["whole"]["speedup"] <= result["speedup"]
    assert 0 < result["alpha"] < 1
    assert "312.8M" in err


def test_json_of_info_goes_to_a_file(tmp_path, monkeypatch, folders, capsys):
    monkeypatch.setattr(pair, "EMBEDDED_TARGET", folders / "target")
    monkeypatch.setattr(pair, "EMBEDDED_DRAFT", folders / "corrupt")
    assert main.main(["info", "--json", str(tmp_path / "info.json")]) == 0
    result = json.loads((tmp_path / "info.json").read_text(encoding="utf-8"))
    assert result["versions"]["jax"] == jax.__version__
    assert len(result["devices"]) == len(jax.devices())
    assert result["models"]["target"]["parameters"] == models.num_parameters(CONFIG)
    assert "corrupt" in result["models"]["draft"]["problem"]
    assert jax.__version__ in capsys.readouterr().out


def test_generate_streams_what_the_decoder_decodes(folders, tmp_path, capsys):
    arguments = ["--num-draft-tokens", "2", "--max-new-tokens", "24", "--temperature", "1"]
    words = [word.format(root=folders) for word in GENERATE]
    words += [*arguments, "--seed", "5", "--json", str(tmp_path / "out.json")]
    assert main.main(words) == 0
    out, err = capsys.readouterr()
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))

    target, draft = (checkpoint.load_model(folders / name) for name in ("target", "draft"))
    decoder = jaxsd.speculative(
        models.language_model(CONFIG),
        jaxsd.model_drafter(models.language_model(CONFIG), 2),
        max_len=27,
        eos_id=256,
    )
    expected = decoder.generate(
        {"target": target.params, "draft": draft.params},
        np.array([list(b"a b")]),
        None,
        jax.random.key(5),
        sampling=jaxsd.Sampling(1.0),
        max_new_tokens=24,
    )
    tokens = np.asarray(expected.tokens)[0, 3 : int(expected.lengths[0])].tolist()
    assert result["tokens"] == tokens
    assert result["text"] == target.tokenizer.decode(tokens)
    assert out == result["text"] + "\n"
    statistics = result["statistics"]
    assert statistics["num_rounds"] == int(expected.stats.num_rounds[0])
    assert statistics["num_drafted"] == int(expected.stats.num_drafted[0])
    assert statistics["num_accepted"] == int(expected.stats.num_accepted[0])
    assert (
        np.rint(np.array(statistics["acceptance_by_position"]) * statistics["num_rounds"]).tolist()
        == np.asarray(expected.stats.accepted_by_position[0]).tolist()
    )
    assert "mean acceptance length" in err


def test_generate_plainly_from_nothing_begins_after_an_end_of_text(folders, capsys):
    words = ["generate", "--target", str(folders / "target"), "--plain"]
    assert main.main([*words, "--max-new-tokens", "3", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompt_tokens"] == [256]
    assert result["settings"]["num_draft_tokens"] == 0
    assert result["statistics"]["mean_acceptance_length"] == 1


def step_info(tokens, num_accepted):
    return jaxsd.StepInfo(
        tokens=np.array([tokens]),
        num_tokens=np.array([len(tokens)]),
        num_drafted=np.array([len(tokens) - 1]),
        num_accepted=np.array([num_accepted]),
        done=np.array([False]),
    )


def test_characters_that_rounds_cut_in_two_are_written_whole():
    """Joining the decoded tokens of each round would show a U+FFFD for each cut."""
    text = "é€\t😀\n" + "x" * 200
    data = list(text.encode("utf-8"))
    file = io.StringIO()
    writer = generate.Writer(corpus.ByteTokenizer(), file, color=False)
    for start in range(0, len(data), 3):
        writer.write(step_info(data[start : start + 3], 1))
    writer.finish()
    assert file.getvalue() == text + "\n"


def test_colors_tell_accepted_tokens_from_the_target_s():
    file = io.StringIO()
    writer = generate.Writer(corpus.ByteTokenizer(), file, color=True)
    writer.write(step_info(list(b"abc"), 2))
    writer.finish()
    green, magenta = "\x1b[32m{}\x1b[0m", "\x1b[1;35m{}\x1b[0m"
    assert file.getvalue() == green.format("a") + green.format("b") + magenta.format("c") + "\n"


def test_train_is_called_with_its_options(monkeypatch, tmp_path, capsys):
    seen = {}

    def fake(out: str, steps: int = 2000, progress: bool = True) -> dict:
        seen.update(out=out, steps=steps, progress=progress)
        return {"steps": steps}

    monkeypatch.setattr(train, "train", fake)
    words = ["train", "--out", str(tmp_path), "--steps", "7", "--no-progress", "--json", "-"]
    assert main.main(words) == 0
    assert json.loads(capsys.readouterr().out) == {"steps": 7}
    assert seen == {"out": str(tmp_path), "steps": 7, "progress": False}


def test_prompts_come_from_different_held_out_files_and_are_reproducible():
    tokenizer = corpus.ByteTokenizer()
    documents = [
        corpus.Document(f"{number}.py", f"line {number}\n" * (number % 40)) for number in range(400)
    ]
    drawn = prompts.draw_prompts(documents, tokenizer, num_prompts=5, length=20, seed=1)
    assert drawn == prompts.draw_prompts(documents, tokenizer, num_prompts=5, length=20, seed=1)
    files = [prompt["file"] for prompt in drawn]
    assert len(set(files)) == 5
    assert all(corpus.is_held_out(file) for file in files)
    texts = dict(documents)
    for prompt in drawn:
        assert len(tokenizer.encode(prompt["text"])) == 20
        assert prompt["text"].startswith("line ")
        assert prompt["text"] in texts[prompt["file"]]
    with pytest.raises(ValueError, match="held-out files"):
        prompts.draw_prompts(documents, tokenizer, num_prompts=300, length=20, seed=1)


def test_a_reader_that_goes_away_and_a_wrong_folder_leave_no_traceback(tmp_path):
    """As a process, because the interpreter itself writes to stdout at exit."""
    command = [sys.executable, "-m", "jaxsd.cli.main"]
    with subprocess.Popen(
        [*command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    done = subprocess.run(
        [*command, "generate", "--target", str(tmp_path / "none"), "--plain"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jaxsd: error: ")
    assert done.stderr.count("\n") == 1
