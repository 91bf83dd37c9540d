"""`jaxsd compile`: what it finds in compiled text, what it reports, what it refuses."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from jaxsd import costmodel, models
from jaxsd.cli import compile as command
from jaxsd.cli import compile_check, main, topology
from jaxsd.models import ahead, compiled_text, families

# A loop with one of everything, as a TPU's compiler writes it: its body copies a cache, fetches one
# into the chip's own memory and brings it back, and adds up activations; the entry copies a cache
# once, and joins the halves of a weight.
PROGRAM = """\
HloModule jit_run, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), \
{2}: (3, {}, must-alias) }, entry_computation_layout={(bf16[2,4,8,16]{3,2,1,0})->bf16[2,4,8,16]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%read (p: bf16[2,4,8,16]) -> bf16[2,4,8] {
  %p = bf16[2,4,8,16]{3,2,1,0} parameter(0)
  %turned = bf16[2,4,16,8]{3,2,1,0} transpose(%p), dimensions={0,1,3,2}
  ROOT %less = bf16[2,4,8]{2,1,0} reduce(%turned), to_apply=%add
}

%rewrite (p: bf16[2,4,8,16]) -> bf16[8,8,16] {
  %p = bf16[2,4,8,16]{3,2,1,0} parameter(0)
  %again = bf16[2,4,8,16]{2,3,1,0} copy(%p)
  ROOT %flat = bf16[8,8,16]{2,1,0} bitcast(%again)
}

%body (s: (bf16[2,4,8,16], f32[4,128])) -> (bf16[2,4,8,16], f32[4,128]) {
  %s = (bf16[2,4,8,16]{3,2,1,0}, f32[4,128]{1,0}) parameter(0)
  %cache = bf16[2,4,8,16]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=0
  %x = f32[4,128]{1,0} get-tuple-element(%s), index=1
  %in = (bf16[2,4,8,16]{3,2,1,0:T(8,128)S(1)}, bf16[2,4,8,16]{3,2,1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%cache)
  %near = bf16[2,4,8,16]{3,2,1,0:T(8,128)S(1)} copy-done(%in)
  %out = (bf16[2,4,8,16]{3,2,1,0:T(8,128)}, bf16[2,4,8,16]{3,2,1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
copy-start(%near)
  %harmless = bf16[2,4,8]{2,1,0} fusion(%cache), kind=kLoop, calls=%read
  %planted = bf16[8,8,16]{2,1,0} fusion(%cache), kind=kLoop, calls=%rewrite
  %apart = (bf16[2,4,8,16]{3,2,1,0}, bf16[2,4,8,16]{2,3,1,0}, u32[]) copy-start(%cache)
  %small = f32[4,128]{0,1} copy(%x)
  %all = f32[4,128]{1,0} all-reduce(%small), replica_groups={}, to_apply=%add
  %begun = (f32[4,32]{1,0}, f32[4,128]{1,0}) all-gather-start(%x), dimensions={1}
  %ended = f32[4,128]{1,0} all-gather-done(%begun)
  ROOT %t = (bf16[2,4,8,16]{3,2,1,0}, f32[4,128]{1,0}) tuple(%cache, %ended)
}

%goes_on (s: (bf16[2,4,8,16], f32[4,128])) -> pred[] {
  %s = (bf16[2,4,8,16]{3,2,1,0}, f32[4,128]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (c: bf16[2,4,8,16], d: bf16[2,4,8,16], x: f32[4,128]) -> bf16[2,4,8,16] {
  %c = bf16[2,4,8,16]{3,2,1,0} parameter(0)
  %d = bf16[2,4,8,16]{3,2,1,0} parameter(1)
  %x = f32[4,128]{1,0} parameter(2)
  %once = bf16[2,4,8,16]{2,3,1,0} copy(%d)
  %joined = f32[4,128]{1,0} custom-call(%x), custom_call_target="ConcatBitcast"
  %start = (bf16[2,4,8,16]{3,2,1,0}, f32[4,128]{1,0}) tuple(%c, %joined)
  %loop = (bf16[2,4,8,16]{3,2,1,0}, f32[4,128]{1,0}) while(%start), condition=%goes_on, body=%body
  %sum.1 = f32[4,128]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %result = bf16[2,4,8,16]{3,2,1,0} get-tuple-element(%loop), index=0
}
"""
CACHE = (2, 4, 8, 16)


def names(lines):
    return [line.split(" = ")[0] for line in lines]


def test_copies_of_caches_are_told_from_reading_and_fetching_them():
    """Inside the fusion that makes the product a cache is turned around, and never stored so."""
    inside = compiled_text.cache_copies(PROGRAM, [CACHE])
    assert names(inside.copies) == ["%planted", "%apart"]
    assert names(inside.moves) == ["%in", "%out"]
    anywhere = compiled_text.cache_copies(PROGRAM, [CACHE], inside_loops=False)
    assert names(anywhere.copies) == ["%planted", "%apart", "%once"]
    assert compiled_text.cache_copies(PROGRAM, [(2, 4, 8, 15)]) == ((), ())


def test_collectives_are_counted_with_their_bytes():
    assert compiled_text.collectives(PROGRAM) == (
        ("all-reduce", 2, 2 * 4 * 128 * 4),
        ("all-gather", 1, 4 * 128 * 4),
    )
    inside = compiled_text.collectives(PROGRAM, inside_loops=True)
    assert {one.kind: one.num for one in inside} == {"all-reduce": 1, "all-gather": 1}


def test_caches_that_are_not_aliased_are_counted():
    assert compiled_text.aliased_caches(PROGRAM, [CACHE]) == (1, 2)
    assert compiled_text.aliased_caches(PROGRAM, [(1, 2)]) == (0, 0)


def test_custom_calls_are_not_taken_for_seconds():
    """The TPU's compiler reports -1 s for each."""
    assert ahead.optimal_seconds(-0.75, PROGRAM) == 0.25
    assert ahead.optimal_seconds(-3.0, PROGRAM) is None
    assert ahead.optimal_seconds(None, PROGRAM) is None


def test_a_program_without_a_loop_is_not_searched_for_one():
    text = PROGRAM.replace(" while(", " call(")
    with pytest.raises(ValueError, match="has no loop"):
        compiled_text.cache_copies(text, [CACHE])


def test_words_of_a_refusal():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 29.92G of 15.75G hbm. Exceeded hbm capacity by 14.17G.\n\nTotal hbm usage: 1"
    )
    assert ahead.out_of_memory(message) == (
        "Ran out of memory in memory space hbm. Used 29.92G of 15.75G hbm."
    )
    other = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.99G) exceeds available HBM (15.75G). Consider less."
    )
    assert ahead.out_of_memory(other).endswith("exceeds available HBM (15.75G).")
    assert ahead.out_of_memory("INVALID_ARGUMENT: no such thing") is None


def test_a_refusing_compiler_is_reported_and_other_errors_are_not_hidden():
    import jax

    def refuse(message):
        def lower():
            raise jax.errors.JaxRuntimeError(message)

        return ahead.Lowering(lower, ())

    refused = ahead.compile_program(refuse("RESOURCE_EXHAUSTED: Ran out of memory. Used 3G."))
    assert refused.refusal == "Ran out of memory. Used 3G."
    assert refused.memory is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        ahead.compile_program(refuse("INTERNAL: a bug"))


TINY = ("--target", "tiny", "--draft", "tiny", "--num-draft-tokens", "2", "--context", "60")
# In a process of its own: JAX makes its devices once.
PROCESS = "import sys; from jaxsd.cli import main; sys.exit(main.main(sys.argv[1:]))"


def run_apart(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, "compile", *arguments, "--json", "-"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """The whole command on four virtual devices, two by two, of too little memory.

    The draft has one key head, which two devices cannot share.
    """
    small = dataclasses.replace(models.CONFIGS["tiny"], n_kv_heads=1)
    folder = tmp_path_factory.mktemp("draft")
    (folder / "config.json").write_text(json.dumps({"config": small.to_dict()}), encoding="utf-8")
    draft = ("--draft", str(folder))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    mesh = ("--mesh", "data=2,model=2", "--batch", "4", "--memory", "100k")
    programs = ("--programs", "loop,target pass")
    return run_apart("--topology", "here", *TINY[:2], *draft, *TINY[4:], *mesh, *programs, **flags)


def test_every_program_is_compiled_for_a_mesh(divided):
    result, text = divided
    programs = result["programs"]
    assert list(programs) == ["loop", "target pass, 1", "target pass, 3"]
    loop = programs["loop"]
    assert loop["num_aliased"] == loop["num_caches"] == 8
    assert loop["cache_copies"] == []
    assert "All 8 caches of the loop are written in place, and none is copied" in text
    # What a device holds: half of the rows and one of two key heads; half of most weights.
    cache = 2 * 2 * (2 * 1 * 64 * 16) * 2
    for name in ("target pass, 1", "target pass, 3"):
        assert programs[name]["memory"]["aliased_bytes"] == cache
    weights = 2 * models.num_parameters(models.CONFIGS["tiny"])
    arguments = programs["target pass, 1"]["memory"]["argument_bytes"]
    assert weights / 2 < arguments - cache < 0.6 * weights


def test_weights_stay_where_they_are(divided):
    """Every device once sent half of its gate and up matrices around, in every layer and pass."""
    config, passes = models.CONFIGS["tiny"], divided[0]["programs"]
    for name in ("target pass, 1", "target pass, 3"):
        kinds = {one["kind"]: one for one in passes[name]["collectives"]}
        assert kinds["all-reduce"]["num"] >= 2 * config.n_layers
        # Activations and logits of 2 rows, 3 tokens: no matrix.
        biggest = 2 * 3 * config.vocab_size * 4
        assert sum(one["num_bytes"] for one in kinds.values()) < 3 * biggest
        assert 3 * biggest < 2 * (2 * config.d_ff * config.d_model * 2)


def test_activations_are_not_gathered_before_every_product(divided):
    """Tokens lie as sampling left them, each row on another device, until a pass says otherwise.

    Without that this loop has 26 gathers, and one of an 8B target with a 1B draft some 300.
    """
    kinds = {one["kind"]: one["num"] for one in divided[0]["programs"]["loop"]["collectives"]}
    assert kinds["all-reduce"] > 0
    assert kinds.get("all-gather", 0) <= 12


def test_too_little_memory_is_reported(divided):
    result, text = divided
    assert result["memory_bytes_per_device"] == 100_000
    assert result["fits"] is False
    assert "loop does not fit: every device would hold" in " ".join(text.split())


def test_a_program_fits_up_to_the_last_byte():
    memory = ahead.Memory(
        argument_bytes=70, output_bytes=60, aliased_bytes=50, temporary_bytes=15, program_bytes=5
    )
    compiled = ahead.Compiled(None, 1.0, memory)
    for capacity, fits in ((100, True), (99, False), (None, None)):
        found = command.as_json(compiled, capacity)
        assert found["fits"] is fits
        assert found["memory"]["total_bytes"] == 100
    assert command.as_json(ahead.Compiled("no room", 1.0), None)["fits"] is False


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install '.[tpu]'",
)
def test_a_small_pair_compiles_for_a_tpu():
    programs = ("--programs", "loop,target pass")
    result, _ = run_apart("--topology", "v5e:2x2", *TINY, "--mesh", "data=1,model=2", *programs)
    loop = result["programs"]["loop"]
    assert result["chip"] == "tpu-v5e"
    assert result["fits"] is True
    assert loop["num_aliased"] == loop["num_caches"] == 8
    assert loop["cache_copies"] == []
    assert loop["optimal_seconds"] is None
    assert 0 < result["programs"]["target pass, 1"]["optimal_seconds"] < 1e-3


def test_the_cost_models_shape_has_the_parameters_of_the_model():
    for config in models.CONFIGS.values():
        shape = compile_check.shape_of(config)
        assert costmodel.parameters_total(shape) == models.num_parameters(config)


def test_published_configurations_are_those_of_the_catalogue():
    for name in ("llama-3.1-8b", "llama-3.2-1b"):
        assert compile_check.shape_of(models.CONFIGS[name]) == costmodel.named_shape(name)


def test_a_folders_config_is_read_without_weights(tmp_path):
    config = models.CONFIGS["tiny"]
    for name, content in (
        ("ours", {"config": config.to_dict()}),
        ("published", families.write_config(config)),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content), encoding="utf-8")
        assert command.read_config("target", str(tmp_path / name)) == config


WRONG = {
    "topology": (("--topology", "v9:2x2"), "topology='v9:2x2' must be a TPU such as"),
    "no grid": (("--topology", "v5e"), "must name a grid of chips, such as v5e:2x2"),
    "no GPU": (("--topology", "h100:0"), "at least one GPU"),
    "target": (("--topology", "here", "--target", "gpt-9"), "target='gpt-9' must be one of tiny"),
    "mesh": (("--topology", "here", "--mesh", "model=2"), "must be of the form data=1,model=4"),
    "mesh size": (("--topology", "here", "--mesh", "data=0,model=1"), "data=0"),
    "devices": (("--topology", "here", "--mesh", "data=9,model=999"), "takes 8991 devices"),
    "batch": (("--topology", "here", "--batch", "0"), "batch=0 must be at least 1"),
    "K": (("--topology", "here", "--num-draft-tokens", "0"), "num_draft_tokens=0"),
    "memory": (("--topology", "here", "--memory", "-1"), "memory=-1 must be a number of bytes"),
    "prompt": (("--topology", "here", *TINY, "--prompt", "61"), "prompt_len=61 must be at most"),
    "programs": (("--topology", "here", "--programs", "looping"), "programs names 'looping'"),
    "vocabulary": (("--topology", "here", "--target", "tiny"), "they must share one"),
    "rows": (("--topology", "here", "--compare-costmodel", "--rows", "1,x"), "rows='1,x'"),
    "no times": (("--topology", "here", "--compare-costmodel"), "must be a TPU: no other compiler"),
    "stack": (("--topology", "here", "--compare-costmodel", "--stack", "x"), "'x' is not a known"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_end_with_one_line(case, capsys):
    arguments, message = WRONG[case]
    assert main.main(["compile", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "package"), [("v5e:2x2", "jaxsd[tpu]"), ("h100:4", "jaxsd[cuda]"), ("{gpu}", "cuda")]
)
def test_a_missing_compiler_is_named(name, package, tmp_path, monkeypatch):
    file = tmp_path / "gpu.txt"
    file.write_text("gpu_device_info { device_memory_size: 1000 }", encoding="utf-8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match="not installed: pip install") as error:
        topology.find(name.format(gpu=file))
    assert package in str(error.value)


def test_a_file_that_describes_no_gpu_is_refused(tmp_path):
    file = tmp_path / "gpu.txt"
    file.write_text("something else", encoding="utf-8")
    with pytest.raises(ValueError, match="must be a text that describes a GPU"):
        topology.find(str(file))
