"""The first layers of a transformer as a language model, with no weights or cache of its own."""

import dataclasses
from typing import Any, NamedTuple

from jax import Array

from .configs import Config
from .transformer import Cache, Params, TransformerLM, language_model


class EarlyExitLM(NamedTuple):
    """The first layers of a transformer, then its final norm and head: a `jaxsd.LanguageModel`.

    config: the shape of the whole transformer, whose weights `apply` takes.
    num_layers: E, how many layers.
    cache_dtype: type of the cached keys and values.
    """

    config: Config
    num_layers: int
    cache_dtype: Any

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """Keys and values of E layers: for use apart from the target; `apply` takes both."""
        return self._part().init_cache(batch_size, max_len)

    def apply(
        self, params: Params, tokens: Array, positions: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Logits of a block of tokens after E layers, and the cache with the block in those.

        Args:
          params: the whole transformer's, of which the other layers are not read.
          tokens: `[B, T]` int32.
          positions: `[B, T]` int32, consecutive within a row.
          cache: of E layers or of all; those beyond E are returned as they are.

        Returns:
          logits `[B, T, V]` float32 and the new cache.
        """
        size = self.num_layers
        layers = {str(index): params["layers"][str(index)] for index in range(size)}
        part = {**params, "layers": layers}
        logits, written = self._part().apply(part, tokens, positions, cache[:size])
        return logits, written + cache[size:]

    def _part(self) -> TransformerLM:
        config = dataclasses.replace(self.config, n_layers=self.num_layers)
        return language_model(config, self.cache_dtype)


def exit_early(model: TransformerLM, num_layers: int) -> EarlyExitLM:
    """The target's first layers as a draft that shares its weights and its cache.

    Keys and values of a layer depend on the layers below it alone, so those that the target left in
    its cache are the very ones that the first layers would make. With `jaxsd.early_exit_drafter`
    there is no second cache and no second prefill.

    Args:
      model: the target.
      num_layers: E, in 1..n_layers; at n_layers it is the target itself.

    Raises:
      ValueError: if `num_layers` is out of range.

    References:
      Elhoushi et al., 2024, LayerSkip, https://arxiv.org/abs/2404.16710; they train the target so
      that its early layers can be read, without which few tokens are accepted.

    >>> import jax, jaxsd
    >>> from jaxsd import models
    >>> target = models.language_model(models.CONFIGS["tiny"])
    >>> drafter = jaxsd.early_exit_drafter(models.exit_early(target, 1), num_tokens=2)
    >>> decoder = jaxsd.speculative(target, drafter, max_len=8)
    >>> params = {"target": models.init_params(target.config, jax.random.key(0))}
    >>> int(decoder.generate(params, [[1, 2]], None, jax.random.key(1)).lengths[0])
    8
    """
    n_layers = model.config.n_layers
    is_integer = isinstance(num_layers, int) and not isinstance(num_layers, bool)
    if not is_integer or not 1 <= num_layers <= n_layers:
        raise ValueError(f"num_layers={num_layers!r} must be an integer in 1..{n_layers}")
    return EarlyExitLM(model.config, num_layers, model.cache_dtype)
