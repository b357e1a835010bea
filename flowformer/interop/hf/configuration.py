"""Configuration class for Flowformer in transformers."""

# Annotations are types here, not text: `strict` reads them.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from flowformer.models.initialization import check_language_init
from flowformer.models.positions import knows_distance


@strict
class FlowformerConfig(PreTrainedConfig):
    """Configuration of a Flowformer: options of :class:`flowformer.models.language.LanguageModel` and of transformers.

    Sizes have the names that transformers and its tools look for; the language model's own, ``dim``, ``num_layers``,
    ``num_heads`` and ``ffn_dim``, are understood too.

    Attributes:
        vocab_size: Tokens of the vocabulary.
        hidden_size: Channels.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads of each attention.
        intermediate_size: Channels inside the feed-forward networks; ``4 * hidden_size`` if absent.
        max_position_embeddings: Longest sequence: a language model's ``max_length``, a name that transformers keeps for
            generation. Needed by learned positions and by mechanisms with parameters for each position.
        positions: ``"learned"``, ``"sinusoidal"``, or None; ``"auto"`` for none where the attention knows distance, and
            else learned ones.
        scale_embedding: Multiply embeddings by sqrt(hidden_size), as fairseq does.
        norm_first: Pre-norm blocks and a final norm; ``False`` for post-norm blocks.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"`` (GPT-2's) or ``"relu"``.
        dropout: Probability, on embeddings and on the outputs of attentions and feed-forward networks.
        activation_dropout: Probability inside the feed-forward networks.
        tie_word_embeddings: Whether the embedding is the output head too.
        attention: Name of a causal mechanism: :func:`flowformer.list_attentions`.
        attention_options: Options of the mechanism; of Flow-Attention by default its preset ``"distance"``.
        init: Fresh parameters as ``"gpt"`` or ``"fairseq"`` has them: see
            :class:`flowformer.models.language.LanguageModel`.
        initializer_range: Deviation of fresh weights with ``init="gpt"``, and of a fresh classification head.
        use_cache: Whether models hand back their state, when they are not being trained.
        bos_token_id: Token that begins a text.
        eos_token_id: Token that ends one, or several such.
        pad_token_id: Token that pads.

    Raises:
        ValueError: for an ``init`` that is neither. What else does not fit, the model refuses when it is built.
        huggingface_hub.errors.StrictDataclassFieldValidationError: for a value of another type.
    """

    model_type = "flowformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_dim": "intermediate_size",
    }

    vocab_size: int = 50_257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int | None = 1_024
    positions: str | None = "auto"
    scale_embedding: bool = False
    norm_first: bool = True
    activation: str = "gelu_tanh"
    dropout: float | int = 0.1
    activation_dropout: float | int = 0.0
    tie_word_embeddings: bool = False
    attention: str = "flow"
    attention_options: dict[str, Any] | None = None
    init: str = "gpt"
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.attention_options is None and self.attention == "flow":
            self.attention_options = {"preset": "distance"}
        if self.positions == "auto":
            self.positions = None if knows_distance(self.attention_options or {}) else "learned"
        check_language_init(self.init)

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer's cache, for ``DynamicCache(config=...)``."""
        return [self.model_type] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Accept all layer types: the check of transformers rejects layers from other packages."""
