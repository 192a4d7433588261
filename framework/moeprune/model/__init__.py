"""The Mixture-of-Experts language model. Knows nothing of Lightning, pruning or the command line.

    config       sizes, as plain data
    router       the contract: which experts a token goes to, with which weights
    experts      the experts of a layer as two tensors; grouped SwiGLU and its slow reference
    moe          router + experts = the layer
    attention    queries, keys and values; standard, or with Yuan 2.0's local filter
    transformer  embedding, blocks of attention and MoE, output head

Letters in names and docstrings: B sequences, S positions, T = B S tokens, V vocabulary, D model width, H heads,
L layers, E experts, K experts per token (top-k), F expert width.
"""
