"""The keys of a network, and the pattern that says which layers it has."""

import math
import re
from dataclasses import dataclass
from typing import Literal

VOCAB_ROW_MULTIPLE = 128
"""Rows of the embedding table are padded in memory to a multiple of this, so that every vocabulary splits."""

LinearMixer = Literal[
    "linear_attention", "performer", "retention", "gated_linear_attention", "gated_delta_net", "mamba2"
]
"""Mixers that read the past from a state of constant size."""

Mixer = Literal["attention", "latent_attention", "lstm", "gru", "mingru", LinearMixer]
"""What lets tokens exchange information: `transformer.models.mixers` has the table."""

RECURRENT: tuple[Mixer, ...] = ("lstm", "gru", "mingru")
"""Mixers that are recurrent networks."""

Pattern = Literal["full", "window", "dilated", "block_sparse"]
"""Which of the keys that causality and segments allow a query of an attention layer sees."""

FeedForwardKind = Literal["dense", "experts", "none"]

Activation = Literal["gelu", "gelu_exact", "relu", "relu_squared", "silu", "swiglu", "geglu", "reglu"]


@dataclass(frozen=True)
class LayerKind:
    """One layer: how tokens mix, which keys attention sees, what follows, and whether it is told rotary positions."""

    mixer: str
    pattern: str = "full"
    feedforward: str = "dense"
    has_positions: bool = True


def parse_layers(text: str) -> tuple[LayerKind, ...]:
    """Returns the kinds of one period of a layer pattern such as `3*attention.window+attention/none`.

    Kinds are joined by `+` and may be repeated, `3*`; each is a mixer, then what its attention sees after a dot, then
    `@none` if it is told no positions, then the feed-forward kind after a slash. Raises ValueError for anything else;
    names are checked by `validation`.
    """
    kinds: list[LayerKind] = []
    for part in text.split("+"):
        match = re.fullmatch(r"(?:(\d+)\*)?(\w+)(?:\.(\w+))?(@none)?(?:/(\w+))?", part.strip())
        if match is None or match[1] == "0" or len(match[1] or "") > 4:
            raise ValueError(f"{part.strip()!r} is not of the form 3*mixer.pattern/feedforward")
        kind = LayerKind(match[2], match[3] or "full", match[5] or "dense", match[4] is None)
        kinds += [kind] * int(match[1] or 1)
    return tuple(kinds)


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer."""

    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """A decoder sees the past, an encoder everything; an encoder-decoder reads one text and writes another."""
    vocab_size: int | None = None
    """Number of tokens the model can tell apart (V); None: as many as tokenizer and objective have."""
    num_labels: int = 0
    """Classes that a classifier's head tells apart; 0: as many as the data has, without labels a head over the vocabulary."""
    num_layers: int = 4
    """Blocks in the stack (L); in the decoder's of an encoder-decoder."""
    num_encoder_layers: int | None = None
    """Blocks in the encoder of an encoder-decoder; None: as many as in the decoder."""
    layers: str = "attention"
    """Kinds of layers, repeated up to num_layers: MIXER[.PATTERN][@none][/FEEDFORWARD], joined by + and multiplied by N*;
    a layer with @none is told no rotary positions."""
    first_layers: str | None = None
    """The same for layers before those, not repeated and counted in num_layers; in the decoder's of an encoder-decoder."""
    encoder_layers: str | None = None
    """The same for the encoder of an encoder-decoder; None: `layers`."""
    width: int = 256
    """Width of the residual stream (D)."""
    recurrent_width: int | None = None
    """Width of the state (W) of layers that are lstm, gru or mingru, both directions of an encoder's together; None: width."""
    cross_attention: Literal["attention", "bahdanau", "luong"] = "attention"
    """How a decoder reads its encoder: with heads; by an additive score inside lstm and gru layers; by a bilinear one."""

    # Attention.
    num_heads: int = 4
    """Query heads (N)."""
    num_kv_heads: int | None = None
    """Key and value heads (K), each shared by N / K query heads; None: as many as query heads."""
    head_width: int | None = None
    """Width of a head (H); None: width / num_heads."""
    attention_scale: float | None = None
    """Factor of the products of queries and keys; None: 1 / sqrt(H), or 8 / H under muP."""
    attention_soft_cap: float = 0.0
    """Attention's logits are bent to stay below this: cap * tanh(logits / cap). 0: not bent."""
    qk_norm: bool = False
    """Normalise queries and keys of self-attention before their product."""
    qk_norm_over: Literal["head", "projection"] = "head"
    """What qk_norm normalises: each head, or all heads of a token together."""
    attention_biases: Literal["none", "qkv", "all"] | None = None
    """Biases of `attention`: in the maps to queries, keys and values, or in the output's too; None: as biases says."""
    window: int = 128
    """Tokens that a layer of pattern `window` sees, itself included, an encoder's as many after it; so does `dilated`."""
    num_sinks: int = 0
    """First tokens of a text that a layer of pattern `window` sees from everywhere."""
    dilation: int = 2
    """Distance between the tokens that a layer of pattern `dilated` sees."""
    sparse_block: int = 64
    """Tokens in a block of pattern `block_sparse`."""
    num_global_blocks: int = 1
    """First blocks of a text that see, and are seen from, everywhere (`block_sparse`)."""
    num_window_blocks: int = 3
    """Blocks that a block sees around itself, itself included, odd; of a causal model the half before (`block_sparse`)."""
    num_random_blocks: int = 2
    """Blocks that a block sees besides, drawn at random once and for all (`block_sparse`)."""
    latent_width: int = 128
    """Width of what keys and values are made from (`latent_attention`); a cache holds this and one rotary key."""
    query_latent_width: int | None = None
    """Width of what queries are made from (`latent_attention`); None: from the residual stream itself."""
    rotary_head_width: int = 32
    """Part of a head, besides head_width, that carries rotary positions (`latent_attention`)."""
    attention_implementation: Literal[
        "auto", "reference", "causal_blocks", "blockwise", "splash", "cudnn", "tokamax"
    ] = "auto"
    """`auto`: by platform, mask and length; `transformer implementations` tells what each of the others can compute."""
    context_attention: Literal["ring", "all_to_all"] = "ring"
    """How texts split over `parallel.context` meet: keys go round a ring, or devices swap lengths for heads and back."""

    # Mixers with a state of constant size.
    recurrence_form: Literal["chunkwise", "parallel", "recurrent"] = "chunkwise"
    """How a state is computed over a text: chunk by chunk, all pairs of tokens at once, or token by token; all agree."""
    chunk_length: int = 64
    """Tokens in a chunk of the chunkwise form."""
    state_width: int | None = None
    """Width of the keys and queries of mixers with a state, which has that many rows a head; None: the head's width."""
    convolution_width: int = 4
    """Tokens that a short convolution sees, its own included (`gated_delta_net`, `mamba2`)."""
    num_features: int = 64
    """Random features of each head of `performer`, which are the rows of its state."""

    # Feed-forward.
    feedforward_width: int | None = None
    """Width of the hidden layer of the MLP (F); None: 4 * width, or 8/3 of it for gated activations, up to a 64th."""
    activation: Activation = "gelu"
    """Feed-forward kind: an MLP with one of these functions (GELU in its tanh form), or a gated one (…glu)."""

    # Experts: layers of feed-forward kind `experts`.
    num_experts: int = 8
    """Experts of a layer (X)."""
    experts_per_token: int = 2
    """Experts that each token passes through."""
    expert_width: int | None = None
    """Width of an expert's hidden layer; None: that of the MLP."""
    num_shared_experts: int = 0
    """Experts that every token passes through besides."""
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    """Whether tokens choose experts, or experts tokens, which takes an encoder: it looks at later tokens."""
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes the router's logits weights of experts."""
    normalize_expert_weights: bool = True
    """Divide the weights of a token's experts by their sum, if it has several."""
    expert_scale: float = 1.0
    """Factor of what the chosen experts add, but not the shared ones."""
    num_expert_groups: int = 1
    """Groups of experts, by the best two of which a token chooses groups first."""
    groups_per_token: int = 1
    """Groups among whose experts a token then chooses."""
    expert_capacity_factor: float | None = None
    """Tokens of a row that an expert takes, as a multiple of its even share; None: as many as choose it."""
    balance_loss: float = 0.01
    """Weight of the loss that spreads tokens over experts."""
    expert_pieces: int = 1
    """Parts of a device's tokens that travel one after another to experts on other devices, where none is dropped."""
    router_z_loss: float = 0.0
    """Weight of the squared log-partition function of the router."""
    balance_bias_rate: float = 0.0
    """Step of biases on the router's choice, which even out the load without a loss; 0: no biases."""

    # Norms, residuals, scales.
    norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """Normalisation: LayerNorm, RMSNorm or none."""
    norm_placement: Literal["pre", "post", "sandwich", "output"] = "pre"
    """Normalise the input of each sublayer (pre), the sum with the residual (post), its output, or both (sandwich)."""
    norm_epsilon: float = 1e-5
    """Added to the variance (LayerNorm) or to the mean square (RMSNorm)."""
    parallel_blocks: bool = False
    """Feed attention and MLP of a block the same input, and add both."""
    residuals: bool = True
    """Add each sublayer's output to its input; False only to show what happens without."""
    residual_scale: float = 1.0
    """Factor of each sublayer's output."""
    embedding_scale: float | None = None
    """Factor of the embeddings; None: sqrt(width), or under muP of base_width, with sinusoidal positions, else 1."""
    biases: bool = False
    """Biases in linear layers and in LayerNorm."""
    embedding_norm: bool = False
    """Normalise what enters the first layer."""
    num_token_types: int = 0
    """Kinds of tokens, with an embedding each, that the array `token_types` of a batch tells apart, such as the first and the
    second of two texts; 0: none."""
    head_transform: bool = False
    """Put a linear map, the MLP's activation and a norm before the head over the vocabulary, as BERT does."""
    head_bias: bool = False
    """Add a bias to the logits over the vocabulary."""
    pooler: bool = False
    """Put a linear map and tanh before the head over labels; without labels, `transformer embed` alone uses them."""
    logit_scale: float = 1.0
    """Factor of the logits over the vocabulary."""
    logit_soft_cap: float = 0.0
    """Logits over the vocabulary are bent to stay below this: cap * tanh(logits / cap). 0: not bent."""
    tied_embeddings: bool = True
    """Use the embedding table as the output head too."""
    decoder_start_token: int | None = None
    """Token before the first that an encoder-decoder writes; None: the tokenizer's for the begin of a text."""
    num_future_tokens: int = 0
    """Tokens beyond the next that further heads predict (objective `multi_token`)."""
    dropout: float = 0.0
    """Share of activations dropped: on the embedding and on each sublayer's output."""
    initial_scale: float = 0.02
    """Standard deviation of initial weights."""
    depth_scaled_init: bool = True
    """Weights that write to the residual stream begin 1 / sqrt(2 * num_layers) as large."""
    parametrization: Literal["standard", "mup"] = "standard"
    """`mup`: scales, learning rates and logits follow the width, so that one learning rate serves all widths."""
    base_width: int = 128
    """Width at which `mup` is the same as `standard`, for heads of 64."""

    # Positions.
    positions: Literal["rotary", "learned", "sinusoidal", "alibi", "relative", "none"] = "rotary"
    """How the model is told the order of tokens."""
    num_positions: int | None = None
    """Rows of the table of learned positions; None: data.sequence_length."""
    rotary_base: float = 10_000.0
    """Base of the geometric series of rotary wavelengths."""
    window_rotary_base: float | None = None
    """The same in layers of pattern `window`, which are then not scaled; None: as in the others."""
    rotary_share: float = 1.0
    """Share of each head that is turned."""
    rotary_scaling: Literal["none", "linear", "dynamic_ntk", "yarn", "llama3"] = "none"
    """How rotary positions reach beyond the length that they were trained for."""
    rotary_factor: float = 1.0
    """Ratio of the new length to rotary_original_length."""
    rotary_original_length: int = 2048
    """Length that the positions were trained for before they were scaled."""
    rotary_attention_factor: float | None = None
    """Factor of cosine and sine under `yarn`; None: 0.1 ln(rotary_factor) + 1."""
    num_relative_buckets: int = 32
    """Distances that `relative` positions tell apart."""
    max_relative_distance: int = 128
    """Distance from which on all fall into the last bucket."""

    # How it is run.
    scan_layers: bool | None = None
    """Compile one block and loop over it (fast to compile) or unroll all; None: unroll on CPU, loop elsewhere."""
    remat: Literal["none", "dots", "full", "names", "offload"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, whole blocks, or all but what remat_names says,
    which is kept (`names`) or waits in the host's memory (`offload`)."""
    remat_names: tuple[str, ...] = ("heads", "mixer_output", "feedforward_hidden")
    """Activations of a block that `names` and `offload` keep: queries, keys and values, what mixing adds to the residual
    stream, and the MLP's before its activation function."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of weights inside matrix products; parameters and softmax stay in float32."""
    matrix_products: Literal["compute_dtype", "int8", "fp8"] = "compute_dtype"
    """Type of the operands of linear maps inside the layers: that of activations, or eight bits (extra `quantization`)."""

    @property
    def width_ratio(self) -> float:
        """How many times as wide as the one whose learning rate muP lets it share; 1 without muP."""
        return self.width / self.base_width if self.parametrization == "mup" else 1.0

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def state_dim(self) -> int:
        return self.head_dim if self.state_width is None else self.state_width

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu", "reglu")

    @property
    def ff_width(self) -> int:
        if self.feedforward_width is not None:
            return self.feedforward_width
        return 64 * math.ceil(8 * self.width / 3 / 64) if self.gated else 4 * self.width

    @property
    def expert_dim(self) -> int:
        return self.ff_width if self.expert_width is None else self.expert_width

    @property
    def recurrent_dim(self) -> int:
        return self.width if self.recurrent_width is None else self.recurrent_width

    @property
    def encoder_depth(self) -> int:
        return self.num_layers if self.num_encoder_layers is None else self.num_encoder_layers

    @property
    def has_encoder(self) -> bool:
        return self.architecture != "decoder"

    @property
    def has_decoder(self) -> bool:
        return self.architecture != "encoder"

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """One period of the (decoder's) layers."""
        return parse_layers(self.layers)

    @property
    def first_kinds(self) -> tuple[LayerKind, ...]:
        """The layers before the first period."""
        return parse_layers(self.first_layers) if self.first_layers else ()

    @property
    def num_periods(self) -> int:
        return (self.num_layers - len(self.first_kinds)) // len(self.kinds)

    @property
    def encoder_kinds(self) -> tuple[LayerKind, ...]:
        """One period of the encoder's layers."""
        both = self.architecture == "encoder_decoder" and self.encoder_layers is not None
        return parse_layers(self.encoder_layers or "") if both else self.kinds

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table in memory: the vocabulary, padded."""
        assert self.vocab_size is not None, "the vocabulary is resolved before the model is built"
        return VOCAB_ROW_MULTIPLE * math.ceil(self.vocab_size / VOCAB_ROW_MULTIPLE)
