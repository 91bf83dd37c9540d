"""`jaxsd bench`: what is compared, in which words, and what is refused."""

import json

import pytest

import jaxsd
from jaxsd import models, trees
from jaxsd.cli import bench, main


@pytest.mark.parametrize(
    ("count", "want"),
    [(1, (-1,)), (2, (-1, -1)), (5, (-1, -1, 0, 0, 2)), (6, (-1, -1, 0, 0, 2, 2))],
)
def test_a_spine_has_a_sibling_beside_every_node_that_goes_on(count, want):
    assert bench._spine(count) == want == trees.check(want)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_way_drafts_as_many_tokens_as_it_says(count):
    draft = models.language_model(models.CONFIGS["tiny"])
    ways = bench._ways(draft, draft, count, [1, 2, 8])
    names = [way.name for way in ways]
    assert sorted(names) == sorted(set(bench.NAMES) - ({"cost-block"} if count < 8 else set()))
    for way in ways:
        assert way.drafter.num_tokens == way.num_tokens == count
        if way.drafter.depth is not None:
            assert way.verifier not in (jaxsd.rejection_sampling, jaxsd.block_verification)


def test_ways_take_turns_and_greedy_text_is_that_of_plain_decoding(capsys):
    """The embedded pair, a few tokens: names, figures within their ranges, one JSON document."""
    arguments = ["--verifiers", "chain-block, lookup-block, cost-block", "--num-tokens", "2"]
    arguments += ["--temperatures", "0,1", "--num-prompts", "1", "--max-new-tokens", "6"]
    assert main.main(["bench", *arguments, "--repeats", "2", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [way["name"] for way in result["ways"]] == [
        "plain",
        "chain-block",
        "lookup-block",
        "cost-block",
    ]
    for way in result["ways"]:
        greedy, sampled = way["figures"]
        assert (greedy["temperature"], sampled["temperature"]) == (0, 1)
        assert greedy["equals_plain"] is True
        assert sampled["equals_plain"] is None
        assert way["compile_seconds"] > 0
        assert way["program_bytes"] > 1000
        for one in way["figures"]:
            assert one["tokens_per_second"] > 0
            assert one["speedup_min"] <= one["speedup"] <= one["speedup_max"]
            assert 1 <= one["mean_acceptance_length"] <= way["num_draft_tokens"] + 1
    plain, chain, lookup, _ = (way["figures"][1] for way in result["ways"])
    assert plain["speedup"] == 1
    assert 0 < chain["first_place_bound"] < 1
    assert lookup["first_place_bound"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--verifiers", "chain-block,fastest"],
            "verifiers has ['fastest']; wanted all, or some of",
        ),
        (["--num-tokens", "0"], "num_tokens='0' must be at least 1"),
        (["--num-tokens", "2.5"], "num_tokens='2.5' must be whole numbers"),
        (["--num-tokens", "two"], "num_tokens='two' must be numbers"),
        (["--temperatures", "-1"], "temperatures='-1' must be at least 0"),
        (["--repeats", "0"], "repeats=0 must be at least 1"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, message, capsys):
    assert main.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
