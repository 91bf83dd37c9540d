"""What does a study of a size train, measure and hold out? All of it is fixed before the first run.

Nothing here depends on a measurement, so that no member is held out, and no length or batch chosen,
because of what came out.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

EMBEDDED = "embedded"
DESIGNED = "designed"


class Member(NamedTuple):
    """One draft of the family."""

    d_model: int
    n_layers: int
    d_ff: int
    steps: int
    tokens: int  # that it is trained on
    is_held_out: bool  # no law sees it

    @property
    def shape_name(self) -> str:
        """Of all members of its width and depth."""
        return shape_name(self.d_model, self.n_layers)

    @property
    def name(self) -> str:
        """Of the member, and of its folder."""
        return f"{self.shape_name}-{self.tokens / 1e6:.3g}M"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole study.

    Attributes:
      budget: its name.
      target_config: name of the shape of a target that the study trains; None: one is given.
      target_steps: steps of that training.
      shapes: width and depth of every draft.
      held_out_shapes: those that the laws do not see, at any number of tokens.
      steps: of training; every shape is trained anew for each, so that every run ends with its own
        decayed learning rate, which is where a loss law holds.
      batch_size: sequences per training step.
      accumulation: micro batches of a training step.
      sequence_length: tokens of each.
      learning_rate: its peak.
      head_dim: of the drafts, which have one key and value head.
      calibration_shapes: width and depth of drafts with random weights whose passes are timed.
      calibration_contexts: tokens in the cache of a timed pass of the target.
      lengths: draft lengths, K, that are predicted and measured.
      fitted_lengths: those whose rounds are timed with more drafts than the smallest, all with
        random weights.
      batches: sequences decoded together.
      temperatures: the first is that of the timed decoding.
      num_prompts: a multiple of every batch; of many batches not all are decoded.
      prompt_length: tokens of each.
      new_tokens: decoded after each on average, and read by target and draft for the acceptance.
      windows: held-out windows whose loss is measured.
      repeats: turns of a timed pass.
      max_width: of the designed draft.
      max_layers: of the designed draft.
      seed: of everything random.
    """

    budget: str
    target_config: str | None
    target_steps: int
    shapes: tuple[tuple[int, int], ...]
    held_out_shapes: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    batch_size: int
    accumulation: int
    sequence_length: int
    learning_rate: float
    head_dim: int
    calibration_shapes: tuple[tuple[int, int], ...]
    calibration_contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    fitted_lengths: tuple[int, ...]
    batches: tuple[int, ...]
    temperatures: tuple[float, ...]
    num_prompts: int
    prompt_length: int
    new_tokens: int
    windows: int
    repeats: int
    max_width: int
    max_layers: int
    seed: int = 0

    @property
    def members(self) -> tuple[Member, ...]:
        """The family, shape by shape."""
        return tuple(
            self.member(*shape, steps)
            for shape, steps in itertools.product(self.shapes, self.steps)
        )

    @property
    def max_len(self) -> int:
        """Of every cache: prompt, text, and as much again for rounds that accept all they draft."""
        return self.prompt_length + 2 * self.new_tokens + max(self.lengths) + 1

    @property
    def context(self) -> float:
        """Tokens in a cache, on average over a text."""
        return self.prompt_length + self.new_tokens / 2

    def member(self, d_model: int, n_layers: int, steps: int) -> Member:
        """A draft of a shape, trained for so many steps."""
        return Member(
            d_model,
            n_layers,
            feed_forward_width(d_model),
            steps,
            steps * self.batch_size * self.sequence_length,
            (d_model, n_layers) in self.held_out_shapes,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def shape_name(d_model: int, n_layers: int) -> str:
    """The name of a width and a depth.

    >>> shape_name(96, 2)
    'w96-l2'
    """
    return f"w{d_model}-l{n_layers}"


def feed_forward_width(d_model: int) -> int:
    """The proportion of the embedded draft, 10 / 3, in whole multiples of 16.

    >>> [feed_forward_width(width) for width in (64, 96, 128)]
    [208, 320, 432]
    """
    return max(16, round(d_model * 10 / 3 / 16) * 16)


def config_of(plan: Plan, vocab_size: int, d_model: int, n_layers: int) -> Any:
    """The `models.Config` of a draft of the family."""
    from jaxsd import models

    return dataclasses.replace(
        models.CONFIGS["embedded-draft"],
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model // plan.head_dim,
        n_kv_heads=1,
        head_dim=plan.head_dim,
        d_ff=feed_forward_width(d_model),
    )


# Shapes of equal parameters outside the token table, but of other widths and depths, stand beside
# others that differ in one of the two: in `small` 64 x 4, 96 x 2 and 128 x 1; 128 x 2 and 192 x 1;
# 128 x 4 and 256 x 1. What is held out lies between the rest.
_SMALL = Plan(
    budget="small",
    target_config=None,
    target_steps=0,
    shapes=((64, 1), (64, 4), (96, 2), (128, 1), (128, 2), (192, 1), (128, 4), (256, 1)),
    held_out_shapes=((96, 2), (128, 1), (128, 2)),
    steps=(256, 768, 1536),
    batch_size=16,
    accumulation=4,
    sequence_length=128,
    learning_rate=3e-3,
    head_dim=32,
    calibration_shapes=((64, 1), (64, 4), (128, 2), (192, 1), (192, 4), (256, 2)),
    calibration_contexts=(64, 192),
    lengths=tuple(range(1, 9)),
    fitted_lengths=(2, 7),
    batches=(1, 4, 8),
    temperatures=(1.0, 0.7, 0.0),
    num_prompts=24,
    prompt_length=64,
    new_tokens=64,
    windows=128,
    repeats=9,
    max_width=384,
    max_layers=8,
)
BUDGETS = {
    # Every stage once, in minutes; its figures mean nothing.
    "smoke": dataclasses.replace(
        _SMALL,
        budget="smoke",
        target_config="tiny",
        target_steps=200,
        shapes=((32, 1), (32, 3), (64, 1), (64, 2), (96, 1)),
        held_out_shapes=((64, 1),),
        steps=(30, 90),
        batch_size=4,
        accumulation=1,
        sequence_length=64,
        calibration_shapes=((32, 1), (32, 3), (64, 2), (96, 1)),
        calibration_contexts=(16, 48),
        lengths=(1, 2),
        fitted_lengths=(1, 2),
        batches=(1, 2),
        temperatures=(1.0, 0.0),
        num_prompts=4,
        prompt_length=16,
        new_tokens=16,
        windows=8,
        repeats=2,
        max_width=96,
        max_layers=3,
    ),
    "small": _SMALL,
    # A chip and an hour: the target, 120 million parameters, is trained first.
    "medium": dataclasses.replace(
        _SMALL,
        budget="medium",
        target_config="120m",
        target_steps=4000,
        shapes=((128, 1), (128, 4), (256, 1), (192, 2), (256, 2), (384, 1), (256, 4), (512, 1)),
        held_out_shapes=((192, 2), (256, 1), (256, 2)),
        steps=(500, 1500, 4500),
        batch_size=64,
        accumulation=1,
        sequence_length=256,
        calibration_shapes=((128, 1), (128, 4), (256, 2), (384, 1), (384, 4), (512, 2)),
        calibration_contexts=(64, 256),
        num_prompts=48,
        new_tokens=128,
        windows=256,
        max_width=768,
        max_layers=8,
    ),
    # Many hours on an accelerator.
    "large": dataclasses.replace(
        _SMALL,
        budget="large",
        target_config="120m",
        target_steps=20000,
        shapes=(
            *((128, 1), (128, 4), (192, 2), (256, 1), (256, 2), (256, 4), (384, 1), (384, 3)),
            *((512, 1), (512, 2), (512, 4), (768, 1)),
        ),
        held_out_shapes=((192, 2), (256, 1), (256, 4), (512, 2)),
        steps=(1000, 3000, 9000, 27000),
        batch_size=64,
        accumulation=1,
        sequence_length=256,
        calibration_shapes=((128, 1), (128, 4), (256, 2), (512, 1), (512, 4), (768, 2)),
        calibration_contexts=(64, 256),
        batches=(1, 4, 8, 32),
        num_prompts=96,
        new_tokens=128,
        windows=512,
        max_width=1024,
        max_layers=12,
    ),
}
