"""`jaxsd fit`: tables in, laws and times out, and back into the other commands."""

import csv
import json
import math
import pathlib
import re

import numpy as np
import pytest

from jaxsd import costmodel
from jaxsd.cli import fit, main, rows

DATA = pathlib.Path(costmodel.__file__).parent / "data"


def run(capsys, *arguments):
    """Exit status and what came out on both streams."""
    status = main.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def write(path, header, *lines):
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """The 16-bit rows of gpt-fast as a file, and the fit to them as another."""
    folder = tmp_path_factory.mktemp("times")
    for weights in ("bf16", "int8"):
        chosen = [
            row
            for row in costmodel.published("gpt_fast_decode_a100")
            if row["weight_format"] == weights
        ]
        with (folder / f"{weights}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, chosen[0])
            writer.writeheader()
            writer.writerows(chosen)
    arguments = ["fit", "times", folder / "bf16.csv", "--chip", "a100-80gb", "--groups", "model"]
    assert main.main([*map(str, arguments), "--json", str(folder / "bf16.json")]) == 0
    return folder


def test_published_pairs_give_the_papers_law(capsys, tmp_path):
    file = tmp_path / "law.json"
    status, out, _ = run(capsys, "fit", "acceptance", DATA / "sdsl_alpha_pairs.csv", "--json", file)
    assert status == 0
    for text in ("130 rows", "draft_slope", "-0.00670", "0.60230", "Held out"):
        assert text in out
    laws = fit.replace_law(costmodel.SDSL, file)
    assert laws.loss == costmodel.SDSL.loss
    pairs = costmodel.published("sdsl_alpha_pairs")
    names = ("draft_perplexity", "target_perplexity", "alpha")
    direct = costmodel.fit_acceptance(*([row[name] for row in pairs] for name in names))
    assert laws.acceptance == direct.result  # every digit, the range and the errors included
    content = json.loads(file.read_text())
    assert [one["name"] for one in content["parameters"]] == list(direct.names)
    np.testing.assert_array_equal(content["covariance"], direct.covariance)
    assert content["r_squared"] == direct.r_squared


def test_one_of_several_targets_is_named(capsys, tmp_path):
    file = tmp_path / "laws.json"
    status, out, _ = run(
        capsys,
        *("fit", "acceptance", DATA / "sdsl_alpha_pairs.csv"),
        *("--per-target", "--form", "power", "--json", file),
    )
    assert status == 0
    assert "coefficient[OPT-13B]" in out
    kind, law = fit.read_law(pathlib.Path(f"{file}#OPT-13B"))
    assert kind == "acceptance"
    assert isinstance(law, costmodel.PowerAcceptanceLaw)
    with pytest.raises(ValueError, match=r"holds laws for OPT-13B, OPT-30B.*name one"):
        fit.read_law(file)


def test_losses_without_embeddings_say_so(capsys, tmp_path):
    table = tmp_path / "losses.csv"
    lines = []
    for n in (1e8, 3e8, 1e9, 4e9):
        for d in (3e9, 2e10, 1e11):
            lines.append(f"{n:g},{d:g},{1.8 + 400 / n**0.34 + 2000 / d**0.37:.12f}")
    write(table, "# made up\nparameters_non_embedding,training_tokens,loss", *lines)
    status, _, _ = run(capsys, "fit", "loss", table, "--json", tmp_path / "law.json")
    assert status == 0
    kind, law = fit.read_law(tmp_path / "law.json")
    assert kind == "loss"
    assert law.embeddings_counted == 0
    np.testing.assert_allclose(law[:5], [1.8, 400, 0.34, 2000, 0.37], rtol=1e-5)
    assert law.fitted == costmodel.LossRange(1e8, 4e9, 3e9, 1e11)  # no shapes: no range of them
    assert fit.replace_law(costmodel.SDSL, tmp_path / "law.json").loss == law


def test_times_are_fitted_and_build_on_each_other(capsys, bf16):
    stack = fit.read_stack(bf16 / "bf16.json")
    content = json.loads((bf16 / "bf16.json").read_text())
    assert content["mean_relative_error"] <= 0.03
    assert content["held_out_error"] <= 0.06
    status, out, _ = run(
        capsys,
        *("fit", "times", bf16 / "int8.csv", "--chip", "a100-80gb", "--free", "memory_efficiency"),
        *("--times", bf16 / "bf16.json", "--json", bf16 / "int8.json"),
    )
    assert status == 0
    assert "memory_efficiency" in out
    quantised = fit.read_stack(bf16 / "int8.json")
    assert quantised.layer_seconds == stack.layer_seconds > 0
    assert quantised.memory_efficiency < stack.memory_efficiency


def test_shapes_may_be_columns(capsys, tmp_path):
    """And a single JSON document goes to stdout, with null for what nobody knows."""
    table = write(
        tmp_path / "times.csv",
        "seconds,vocab_size,d_model,n_layers,n_heads,n_kv_heads,head_dim,d_ff,tied_embeddings",
        "0.0016,32000,1024,24,8,8,128,2816,1",
        "0.0010,32000,2048,8,16,16,128,5504,0",
    )
    status, out, err = run(capsys, "fit", "times", table, "--chip", "a100-80gb", "--json", "-")
    assert status == 0
    content = json.loads(out)
    assert content["parameters"][0]["standard_error"] is None
    assert "unknown" in err
    law = fit.decode(content["law"], "stdout")
    shape = costmodel.Shape(32000, 1024, 24, 8, 8, 128, 2816, True)
    seconds = costmodel.pass_seconds(shape, costmodel.named_chip("a100-80gb"), 1, 1, 0, stack=law)
    assert float(seconds) == pytest.approx(0.0016, rel=1e-5)


LOSSES = "parameters_total,training_tokens,loss"


@pytest.mark.parametrize(
    ("kind", "lines", "options", "message"),
    [
        ("acceptance", ["draft_perplexity,alfa", "20,.6"], [], "has no column alpha; its columns"),
        ("loss", ["training_tokens,loss", "1e9,3"], [], "parameters_total or parameters_non_emb"),
        ("loss", [LOSSES + ",n_layer", "1e8,1e9,3,4"], [], "column 'n_layer', which is none of"),
        ("loss", [LOSSES, "1e8,1e9"], [], "row 1 of .* has 2 cells, not 3"),
        ("loss", [LOSSES, "1e8,1e9,x"], [], "loss of row 1 is 'x', not a number"),
        ("loss", [LOSSES, "1e8,1e9,nan"], [], "loss=nan of row 1 must be finite"),
        ("loss", [LOSSES], [], "has no rows"),
        ("loss", [LOSSES, "1e8,1e9,3"], [], "1 rows do not determine 5 parameters"),
        ("loss", [LOSSES, "1e8,1e9,3"], ["--chip", "l4"], "for times, not for loss"),
        ("loss", [LOSSES, "1e8,1e9,3"], ["--form", "log"], "of an acceptance law, not of loss"),
        ("loss", [LOSSES, "1e8,1e9,3"], ["--groups", "size"], "no column 'size' among"),
        ("loss", [LOSSES, "1e8,1e9,3"], ["--per-target"], "is for acceptance, not for loss"),
        ("acceptance", ["draft_perplexity,alpha", "20,.6"], [], "needs a column target_perplex"),
        ("times", ["model,seconds", "opt-125m,1e-3"], [], "times need --chip"),
        ("times", ["model,seconds", "opt-124m,1e-3"], ["--chip", "l4"], "opt-125m"),
        ("times", ["seconds,d_model", "1e-3,768"], ["--chip", "l4"], "a shape needs the columns"),
        (
            "times",
            ["model,tokens_per_second", "opt-125m,0"],
            ["--chip", "l4"],
            "tokens_per_second=0 of row 1 must be positive",
        ),
        (
            "times",
            ["model,seconds,weight_format", "opt-125m,1e-3,int3"],
            ["--chip", "l4"],
            "weight_format='int3' must be one of bf16, int8, int4",
        ),
        (
            "times",
            ["model,seconds", "opt-125m,1e-3"],
            ["--chip", "l4", "--free", "layers"],
            "must be names among memory_efficiency",
        ),
    ],
)
def test_wrong_tables_end_with_status_2(capsys, tmp_path, kind, lines, options, message):
    table = write(tmp_path / "rows.csv", *lines)
    status, _, err = run(capsys, "fit", kind, table, *options)
    assert status == 2
    assert err.count("\n") == 1, err
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "was not written by"),
        ('{"kind": "poem"}', "was not written by"),
        ('{"kind": "loss", "law": {"type": "Path", "values": {}}}', "'Path', which is none of"),
        ('{"kind": "loss", "law": {"type": "LossLaw", "values": {"x": 1}}}', "LossLaw has no 'x'"),
        ('{"kind": "loss", "law": {"type": "LossLaw", "values": {}}}', "LossLaw lacks a field"),
        (
            '{"kind": "loss", "law": {"type": "LossLaw", "values": {"irreducible": "os"}}}',
            "'os', which is not a number",
        ),
        ('{"kind": "times", "law": {"type": "Stack", "values": {}}}', "Stack lacks a field"),
    ],
)
def test_other_files_are_no_laws(tmp_path, content, message):
    file = write(tmp_path / "law.json", content)
    with pytest.raises(ValueError, match=message):
        fit.replace_law(costmodel.SDSL, file)


def test_a_law_is_not_a_stack(tmp_path, bf16):
    with pytest.raises(ValueError, match="is a fit of times, not of a law"):
        fit.replace_law(costmodel.SDSL, bf16 / "bf16.json")
    law = {"kind": "loss", "law": fit.encode(costmodel.BESIROGLU)}
    file = write(tmp_path / "law.json", json.dumps(law))
    with pytest.raises(ValueError, match="is a fit of loss, not of times"):
        fit.read_stack(file)
    with pytest.raises(ValueError, match="one law for all targets"):
        fit.read_law(pathlib.Path(f"{file}#x"))


@pytest.mark.parametrize(
    "law",
    [
        costmodel.SDSL_ACCEPTANCE,
        costmodel.MORPH,
        costmodel.KAPLAN,
        costmodel.LogAcceptanceLaw(-0.1, 1.0),
        costmodel.PowerAcceptanceLaw(1.2, -0.2),
        costmodel.MeasuredAcceptance(0.7),
        costmodel.Stack(0.8, 0.7, 0.0, 5e-5, 2e-5, 0.0, 8.0, 0.0),
    ],
    ids=lambda law: type(law).__name__,
)
def test_laws_survive_json(law):
    text = json.dumps(fit.encode(law), allow_nan=False)
    assert fit.decode(json.loads(text), "here") == law


def test_infinite_ends_of_a_range_come_back():
    law = costmodel.LossLaw(1.8, 400.0, 0.34, 2000.0, 0.37)
    again = fit.decode(json.loads(json.dumps(fit.encode(law))), "here")
    assert again == law
    assert again.fitted.max_tokens == math.inf


def test_comments_blanks_and_byte_order_marks_are_no_rows(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes("\ufeff# note\n\n draft_perplexity , alpha\n20, .6\n\n# end\n".encode())
    assert rows.read_table(file, "acceptance") == [{"draft_perplexity": "20", "alpha": ".6"}]
