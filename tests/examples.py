"""A target, chips and a draft for tests of the cost model: real numbers, no catalogue."""

from jaxsd import costmodel

# An H100 with what torch.compile makes of it, and an A100.
H100 = costmodel.Chip(989e12, 1979e12, 1979e12, 3.35e12, 80e9, 450e9)
A100 = costmodel.Chip(312e12, 624e12, 0.0, 2.039e12, 80e9, 300e9)
COMPILED = costmodel.Stack(0.8, 0.7, 0.0, 47.5e-6, 20.6e-6, 0.0, 8.0, 0.0)
IDEAL = costmodel.Stack(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1e6, 0.0)

LLAMA_70B = costmodel.Shape(128256, 8192, 80, 64, 8, 128, 28672, False)
LLAMA_8B = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
LLAMA_1B = costmodel.Shape(128256, 2048, 16, 32, 8, 64, 8192, True)
MIXTRAL = costmodel.Shape(
    32000, 4096, 32, 32, 8, 128, 14336, False, n_shared_experts=0, n_experts=8, experts_per_token=2
)

TARGET = costmodel.Target(LLAMA_70B, 15e12)
DRAFT = costmodel.Design(LLAMA_1B, 9e12, 5.0)
FOUR_H100 = costmodel.Hardware(costmodel.Devices(H100, COMPILED, 4))


def cubic_shape(d_model, n_layers):
    """The textbook's 12 L d^2 parameters, without embeddings, norms or shared heads."""
    heads = d_model / 128
    return costmodel.Shape(
        1e-6,
        d_model,
        n_layers,
        heads,
        heads,
        128.0,
        4 * d_model,
        True,
        mlp_matrices=2,
        norm_vectors_per_layer=0,
        final_norm_vectors=0,
    )
