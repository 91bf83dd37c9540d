"""`jaxsd design` for shapes, and `jaxsd estimate`: answers, pictures, and what they refuse."""

import json
import shlex
import sys

import pytest

from jaxsd import costmodel
from jaxsd.cli import main

DESIGN = shlex.split("design --target llama-3.1-70b --chip h100-sxm --chips 4")
ESTIMATE = shlex.split(
    "estimate --target llama-3.1-70b --draft llama-3.2-1b --chip h100-sxm --chips 4"
)


def run(capsys, *arguments):
    assert main.main([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def designed(tmp_path_factory):
    """One question with everything: a budget, a batch, a picture."""
    folder = tmp_path_factory.mktemp("design")
    file, picture = folder / "design.json", folder / "design.png"
    arguments = "--batch 16 --context 4096 --train-flops 1e21 --free d_model,n_layers,gamma,tokens"
    status = main.main([*DESIGN, *arguments.split(), "--plot", str(picture), "--json", str(file)])
    assert status == 0
    return json.loads(file.read_text()), picture


def test_a_design_is_the_searchs(designed):
    result, _ = designed
    devices = costmodel.Devices(
        costmodel.named_chip("h100-sxm"), costmodel.named_stack("torch-compile")
    )
    shape = costmodel.named_shape("llama-3.1-70b")
    choices = costmodel.hardware_choices(devices, 4, shape)
    expected = costmodel.search(
        costmodel.Target(shape, 15e12),
        [choice for choice in choices if not choice.draft_apart],
        costmodel.draft_template(shape, tokens=1e12),
        ("d_model", "n_layers", "gamma", "tokens"),
        workload=costmodel.Workload(16, 4096),
        limits=costmodel.Limits(training_flops=1e21),
    )
    best = expected.best
    assert result["speculate"]
    assert result["shape"]["d_model"] == best.design.shape.d_model
    assert result["shape"]["n_layers"] == best.design.shape.n_layers
    assert result["gamma"] == best.design.gamma
    assert result["objective_value"] == pytest.approx(best.objective, rel=1e-9)
    assert result["draft_tokens"] == pytest.approx(best.design.tokens, rel=1e-9)
    assert result["estimate"]["binding"] in costmodel.TERMS
    parts = result["estimate"]["round"]
    pieces = ("draft_seconds", "verify_seconds", "host_seconds", "transfer_seconds")
    assert sum(parts[name] for name in pieces) == pytest.approx(parts["seconds"], rel=1e-9)


def test_a_design_says_how_well_it_is_known(designed):
    result, _ = designed
    interval = result["interval"]
    speedup = result["estimate"]["speedup"]
    assert interval["value"] == pytest.approx(speedup, rel=1e-6)
    assert interval["pair_low"] < interval["low"] < speedup < interval["high"]
    assert "laws.acceptance.intercept" in result["elasticities"]
    one, five = result["flat_region"]
    assert one["num_designs"] < five["num_designs"]
    assert "training FLOPs of the draft" in result["at_bound"]
    assert any("the target's parameters: 4.41 times above 16B" in x for x in result["extrapolated"])
    assert any("target on 1 chip" in reason for reason in result["infeasible"])
    gains = [point["speedup"] for point in result["front"]]
    assert len(gains) >= 3


def test_a_design_is_drawn(designed):
    _, picture = designed
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 50_000  # not an empty canvas


def test_a_design_in_words(designed, capsys):
    """The same question again, compiled already: what a person sees."""
    question = "--draft-tokens 1T --gamma 4 --draft-weights bf16,int4"
    status = main.main([*DESIGN, *shlex.split(question)])
    text = capsys.readouterr().out
    assert status == 0
    for words in (
        "predicted speed-up",
        "Milliseconds of a round",
        "nearly as good",
        "Extrapolated",
    ):
        assert words in text


def test_plain_decoding_may_be_the_answer(capsys):
    """Thirty tokens a round from a draft that has hardly been trained."""
    question = "design --target llama-3.1-8b --chip tpu-v4 --chips 1 --batch 48 --context 128"
    answer = "--draft-tokens 1e9 --max-token-seconds 10 --gamma 30"
    result = run(capsys, *shlex.split(question), *shlex.split(answer))
    assert result["speculate"] is False
    assert result["gamma"] == 0
    assert result["estimate"]["speedup"] == 1


def test_estimate_is_the_throughput_of_a_known_pair(capsys):
    result = run(capsys, *ESTIMATE, "--gamma", "5")
    estimate = result["estimate"]
    devices = costmodel.Devices(
        costmodel.named_chip("h100-sxm"), costmodel.named_stack("torch-compile"), 4
    )
    expected = costmodel.throughput(
        costmodel.Design(costmodel.named_shape("llama-3.2-1b"), 9e12, 5),
        costmodel.Target(costmodel.named_shape("llama-3.1-70b"), 15e12),
        costmodel.Hardware(devices),
        laws=costmodel.SDSL,
    )
    assert estimate["speedup"] == pytest.approx(float(expected.speedup), rel=1e-6)
    assert result["fits"] is True
    assert result["interval"]["low"] < estimate["speedup"]


def test_estimate_takes_what_was_measured(capsys):
    alpha = run(capsys, *ESTIMATE, "--gamma", "3", "--alpha", "0.8")["estimate"]
    assert alpha["tokens_per_round"] == pytest.approx(1 + 0.8 + 0.64 + 0.512, rel=1e-6)
    shares = run(capsys, *ESTIMATE, "--gamma", "2", "--acceptance-by-position", "0.9,0.4")
    assert shares["estimate"]["tokens_per_round"] == pytest.approx(2.3, rel=1e-6)
    assert shares["extrapolated"] == []
    apart = run(capsys, *ESTIMATE, "--gamma", "3", "--alpha", "0.8", "--apart")["estimate"]
    assert apart["num_chips"] == 5
    assert apart["round"]["transfer_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("design",), "give either --target and --chip"),
        (DESIGN[:3], "--target needs --chip"),
        ((*DESIGN, "--target-params", "70B"), "give either --target and --chip"),
        (("design", "--target-params", "70B", "--target-tokens", "1T"), "--draft-tokens"),
        (DESIGN, "give --draft-tokens, or --train-flops, or free tokens"),
        ((*DESIGN[:2], "llama-70b", *DESIGN[3:], "--draft-tokens", "1T"), "Known are gpt2"),
        ((*DESIGN[:4], "h100", *DESIGN[5:], "--draft-tokens", "1T"), "did you mean 'h100-sxm'"),
        ((*DESIGN, "--draft-tokens", "1T", "--stack", "cuda"), "Known are ideal"),
        ((*DESIGN, "--draft-tokens", "1T", "--free", "width"), "must be one or more of d_model"),
        ((*DESIGN, "--draft-tokens", "1T", "--loss-law", "besiroglu"), "are not identified"),
        ((*DESIGN, "--draft-tokens", "1T", "--plot", "/nowhere/x.png"), "an existing folder"),
        ((*DESIGN, "--draft-tokens", "1T", "--plot", "x.bmp"), "must end in .png"),
        ((*DESIGN[:-1], "1", "--draft-tokens", "1T"), "memory of a chip is 1.96 times"),
        ((*DESIGN, "--draft-tokens", "1T", "--laws", "no.json"), "no.json"),
        ((*DESIGN, "--draft-tokens", "1T", "--draft-weights", "fp3"), "out of bf16, int8, int4"),
        ((*ESTIMATE, "--gamma", "-1"), "design.gamma=-1 must be at least 0"),
        ((*ESTIMATE[:-1], "3", "--gamma", "4"), "cannot be cut into 3 parts"),
        ((*ESTIMATE, "--gamma", "4", "--alpha", "2"), "MeasuredAcceptance.alpha=2"),
        ((*ESTIMATE, "--gamma", "4", "--acceptance-by-position", "a"), "separated by commas"),
        (
            (*ESTIMATE, "--gamma", "4", "--alpha", "0.5", "--acceptance-by-position", "0.5"),
            "exclude each other",
        ),
        ((*ESTIMATE[:2], "gpt2", *ESTIMATE[3:-1], "1", "--gamma", "4"), "give --target-tokens"),
    ],
)  # fmt: skip
def test_wrong_questions_end_with_status_2_and_the_reason(arguments, message, capsys):
    assert main.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxsd: error: ")
    assert message in error


def test_a_plot_without_matplotlib_is_refused_before_the_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = str(tmp_path / "x.png")
    assert main.main([*DESIGN, "--draft-tokens", "1T", "--plot", picture]) == 2
    assert "pip install 'jaxsd[plot]'" in capsys.readouterr().err
