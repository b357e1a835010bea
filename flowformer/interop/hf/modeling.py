"""The models: what transformers asks of one, around the blocks of :mod:`flowformer.models.language`."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from flowformer.core.checks import describe
from flowformer.interop.hf.cache import read_cache, write_cache
from flowformer.interop.hf.configuration import FlowformerConfig
from flowformer.mechanisms import create_attention
from flowformer.mechanisms.base import Attention
from flowformer.models.cross_entropy import check_tokens
from flowformer.models.encoder import EncoderBlock
from flowformer.models.language import Decoder, LanguageState
from flowformer.models.positions import count_positions, create_positions

# The old name of `cache`, which transformers itself understands until then.
_old_cache_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")


class FlowformerBlock(GradientCheckpointingLayer, EncoderBlock):
    """A block of the decoder, which transformers can checkpoint. Arguments as those of :class:`EncoderBlock`."""

    def forward(self, x: Tensor, **arguments: Any) -> Any:
        """As :meth:`EncoderBlock.forward`; one token after a state goes the way of a step, which costs less."""
        state = arguments.get("initial_state")
        alone = x.shape[1] == 1 and arguments.get("mask") is None
        if alone and state is not None and arguments.get("return_state"):
            out, state = self.step(x.squeeze(1), state)
            return out.unsqueeze(1), state
        return super().forward(x, **arguments)


def _attention_arguments(config: FlowformerConfig) -> dict[str, Any]:
    return {"causal": True, "max_length": config.max_position_embeddings}


def _block(config: FlowformerConfig) -> FlowformerBlock:
    return FlowformerBlock(
        config.hidden_size, config.num_attention_heads, cast("int", config.intermediate_size), dropout=config.dropout,
        attention=config.attention, attention_options=config.attention_options, norm_first=config.norm_first,
        activation=config.activation, activation_dropout=config.activation_dropout, **_attention_arguments(config),
    )  # fmt: skip


class FlowformerPreTrainedModel(PreTrainedModel):
    """What the models share: how weights begin, and what transformers may do with them."""

    config: FlowformerConfig
    config_class = FlowformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlowformerBlock"]  # noqa: RUF012 - no class variable in transformers
    _is_stateful = True
    _can_record_outputs = {"hidden_states": FlowformerBlock}  # noqa: RUF012 - as above
    _input_embed_layer = "embed"

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: fresh parameters begin as in the models of transformers, by functions that leave loaded ones alone."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh parameters of one module, children first: :class:`LanguageModel` says which."""
        if isinstance(module, Attention):
            self._init_mechanism(module)
        elif self.config.init == "gpt" or "Norm" in type(module).__name__ or module is getattr(self, "score", None):
            super()._init_weights(module)
        elif isinstance(module, nn.Embedding) or module is self.get_output_embeddings():
            init.normal_(cast("Tensor", module.weight), std=self.config.hidden_size**-0.5)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        if isinstance(module, FlowformerBlock):
            self._init_block(module)

    def _init_block(self, block: FlowformerBlock) -> None:
        if self.config.init == "gpt":
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(block.linear2.weight, std=std)
            return
        attention = block.attention
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            init.xavier_uniform_(projection.weight, gain=1 / math.sqrt(2))
        init.xavier_uniform_(attention.out_proj.weight)
        if attention.out_proj.bias is not None:
            init.zeros_(attention.out_proj.bias)

    def _init_mechanism(self, attention: Attention) -> None:
        """Parameters of a mechanism that are not linear layers begin as in a new module of it."""
        own = dict(attention.named_parameters(recurse=False))
        if not own:
            return
        config = self.config
        fresh = create_attention(
            config.attention, config.hidden_size, config.num_attention_heads, **_attention_arguments(config),
            **(config.attention_options or {}),
        )  # fmt: skip
        for name, parameter in own.items():
            init.copy_(parameter, fresh.get_parameter(name))


class FlowformerModel(FlowformerPreTrainedModel):
    """The decoder without a head.

    Padding is invisible, on either side: positions count real tokens only, and a row gives what it gives alone.

    Args:
        config: The options.

    Raises:
        ValueError, TypeError: for options that do not fit.
    """

    def __init__(self, config: FlowformerConfig) -> None:
        super().__init__(config)
        if config.vocab_size < 1 or config.num_hidden_layers < 1:
            raise ValueError(
                "vocab_size and num_hidden_layers must be positive, got"
                f" {config.vocab_size} and {config.num_hidden_layers}"
            )
        self.scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = create_positions(config.positions, config.hidden_size, config.max_position_embeddings)
        self.dropout = nn.Dropout(config.dropout)
        blocks: list[EncoderBlock] = [_block(config) for _ in range(config.num_hidden_layers)]
        self.decoder = Decoder(blocks, config.hidden_size, norm_first=config.norm_first)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    @_old_cache_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: Any = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of tokens, or of their embeddings.

        Args:
            input_ids: (batch, length), integers below ``vocab_size``; any at padding.
            attention_mask: (batch, length), or (batch, tokens so far + length) with a cache; 1 or True = a real token,
                padding on either side.
            cache: What came before: a cache that the model returned, or ``DynamicCache(config=config)``. It goes on.
            inputs_embeds: (batch, length, dim), instead of ``input_ids``; as the embedding gives them.
            use_cache: Return the cache; where not said, if one was given, or ``config.use_cache`` outside of training.
                While activations are checkpointed, none is.
            output_attentions: Refused: no mechanism but softmax has a map of weights, and it does not keep it.
            output_hidden_states: Return the embeddings and the outputs of all blocks too, or of those numbered.

        Returns:
            ``last_hidden_state`` (batch, length, dim), zeros at padding; ``cache``; ``hidden_states``.

        Raises:
            ValueError, TypeError: for input that is not as said above, or a sequence beyond the learned positions.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: a Flowformer has no attention weights to return")
        batch, length = _sizes(input_ids, inputs_embeds)
        cache = self._prepare_cache(cache, use_cache)
        before = read_cache(cache, self.config.num_hidden_layers, batch)
        seen = 0 if cache is None else cache.get_seq_length()
        real = _real_tokens(attention_mask, batch, length, seen, before)
        x = self._embed(input_ids, inputs_embeds, real, None if before is None else before.length)
        hidden_wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        # This way is faster where there is padding, but hidden states between the blocks have another shape there.
        if cache is None and not hidden_wanted:
            return BaseModelOutputWithPast(last_hidden_state=self.decoder(x, real))
        now = torch.full_like(x[:, 0, 0], length, dtype=torch.int64) if real is None else real.sum(-1)
        states = (None,) * self.config.num_hidden_layers if before is None else before.layers
        x, states = self.decoder.extend(x, real, states)
        if cache is not None:
            write_cache(cache, LanguageState(now if before is None else before.length + now, states), length)
        return BaseModelOutputWithPast(last_hidden_state=x, cache=cache)

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to go on with, if any."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("no cache while activations are checkpointed: disable one of the two")
            return None
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if cache is not None and not use_cache:
            raise ValueError("a cache goes on as it is read: use_cache=False does not go with one")
        return DynamicCache(config=self.config) if use_cache and cache is None else cache

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, real: Tensor | None, before: Tensor | None
    ) -> Tensor:
        """Embeddings and positions, (batch, length, dim)."""
        if input_ids is not None:
            input_ids = input_ids if real is None else input_ids.masked_fill(~real, 0)
            check_tokens("input_ids", input_ids, self.config.vocab_size)
            x = self.embed(input_ids)
        else:
            x = cast("Tensor", inputs_embeds)
            x = x if real is None else x.masked_fill(~real.unsqueeze(-1), 0)
        positions = count_positions(x[..., 0], real, before)
        x = x * self.scale
        if self.position is not None:
            x = x + self.position(positions).to(x.dtype)
        return self.dropout(x)


class FlowformerForCausalLM(FlowformerPreTrainedModel, GenerationMixin):
    """The decoder and a head that scores the vocabulary for the token that follows.

    Args:
        config: The options.

    Raises:
        ValueError, TypeError: for options that do not fit.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012 - no class variable in transformers

    def __init__(self, config: FlowformerConfig) -> None:
        super().__init__(config)
        self.model = FlowformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @_old_cache_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the token that follows, at each position.

        Args:
            input_ids: As in :meth:`FlowformerModel.forward`, as are the next three and ``use_cache``.
            attention_mask: As there.
            cache: As there.
            inputs_embeds: As there.
            labels: (batch, length): the tokens again, or -100 for those that do not count. They are shifted here. Those
                at padding do not count, nor does a row's first token, which has nothing to be foretold from.
            use_cache: As there.
            logits_to_keep: Score the last so many positions only (0: all), or those numbered; not with ``labels``.
            **kwargs: ``num_items_in_batch`` to divide the loss by, ``shift_labels`` that are shifted already, and the
                other arguments of :meth:`FlowformerModel.forward`.

        Returns:
            ``logits`` (batch, length, vocab_size), which mean nothing at padding; ``loss`` with labels; ``cache``;
            ``hidden_states``.

        Raises:
            ValueError, TypeError: as :meth:`FlowformerModel.forward`; for labels of another shape.
        """
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        if labels is not None:
            labels = _countable(labels, attention_mask, _sizes(input_ids, inputs_embeds), logits_to_keep)
        out = self.model(input_ids, attention_mask, cache, inputs_embeds, use_cache, **kwargs)
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=out.cache, hidden_states=out.hidden_states)

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation must be absent: a Flowformer has its own cache; got {kind!r}")
        return cast("Any", super())._prepare_cache_for_generation(generation_config, *args, **kwargs)


class FlowformerForSequenceClassification(FlowformerPreTrainedModel):
    """The decoder and a head that scores classes, or a number, from the last real token of a sequence.

    Args:
        config: The options, with ``num_labels`` and ``problem_type``.

    Raises:
        ValueError, TypeError: for options that do not fit.
    """

    def __init__(self, config: FlowformerConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FlowformerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 0, bias=False)
        self.post_init()

    @can_return_tuple
    @_old_cache_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores of classes.

        Args:
            input_ids: As in :meth:`FlowformerModel.forward`, as are the next three and ``use_cache``.
            attention_mask: As there. Without one, the last token is the last that is not ``config.pad_token_id``.
            cache: As there.
            inputs_embeds: As there.
            labels: (batch,) classes or numbers, or (batch, num_labels) as ``config.problem_type`` has it.
            use_cache: As there.
            **kwargs: The other arguments of :meth:`FlowformerModel.forward`.

        Returns:
            ``logits`` (batch, num_labels); ``loss`` with labels; ``cache``; ``hidden_states``.

        Raises:
            ValueError, TypeError: as :meth:`FlowformerModel.forward`.
        """
        batch, length = _sizes(input_ids, inputs_embeds)
        out = self.model(input_ids, attention_mask, cache, inputs_embeds, use_cache, **kwargs)
        hidden = out.last_hidden_state
        last = _last_token(input_ids, attention_mask, length, self.config.pad_token_id)
        logits = self.score(hidden[:, -1] if last is None else hidden[torch.arange(batch, device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, cache=out.cache, hidden_states=out.hidden_states
        )


def _sizes(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """(batch, length) of the input, be it tokens or embeddings."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give input_ids or inputs_embeds, and not both")
    if input_ids is not None:
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise TypeError(f"input_ids must be integers, got {describe(input_ids)}")
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise ValueError(f"input_ids must be (batch, length) with one token or more, got {describe(input_ids)}")
        return input_ids.shape[0], input_ids.shape[1]
    embeds = cast("Tensor", inputs_embeds)
    if embeds.ndim != 3 or not embeds.shape[1]:
        raise ValueError(f"inputs_embeds must be (batch, length, dim) with one token or more, got {describe(embeds)}")
    return embeds.shape[0], embeds.shape[1]


def _real_tokens(
    attention_mask: Tensor | None, batch: int, length: int, seen: int, before: LanguageState | None
) -> Tensor | None:
    """Which of the new tokens are real, (batch, length) boolean; None where all are."""
    if attention_mask is None:
        return None
    if attention_mask.shape not in ((batch, length), (batch, seen + length)):
        so_far = f" or {(batch, seen + length)}" if seen else ""
        raise ValueError(f"attention_mask must be {(batch, length)}{so_far}, got {describe(attention_mask)}")
    mask = attention_mask.bool()
    if torch.compiler.is_compiling():
        return mask[:, -length:]
    # On the CPU only, for elsewhere it would wait for the device at every token.
    if before is not None and mask.shape[1] > length and mask.device.type == "cpu":
        claimed = mask[:, :-length].sum(-1)
        if not torch.equal(claimed, before.length):
            raise ValueError(
                f"attention_mask says that {claimed.tolist()} of the earlier tokens were real, and the cache that"
                f" {before.length.tolist()} were"
            )
    mask = mask[:, -length:]
    return None if mask.all() else mask


def _countable(
    labels: Tensor, attention_mask: Tensor | None, sizes: tuple[int, int], logits_to_keep: int | Tensor
) -> Tensor:
    """Labels, with -100 at padding and where nothing but padding comes before."""
    if labels.shape != sizes:
        raise ValueError(f"labels must be {sizes}, as the input is, got {describe(labels)}")
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError("logits_to_keep does not go with labels, which want the scores of all positions")
    if attention_mask is None:
        return labels
    real = attention_mask[:, -labels.shape[1] :].bool().to(labels.device)
    return labels.masked_fill(~(real & nn.functional.pad(real[:, :-1], (1, 0), value=True)), -100)


def _last_token(
    input_ids: Tensor | None, attention_mask: Tensor | None, length: int, pad_token_id: int | None
) -> Tensor | None:
    """Where the last real token of each row is, (batch,); None where it is at the end."""
    if attention_mask is not None:
        real = attention_mask[:, -length:].bool()
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    else:
        return None
    return (torch.arange(length, device=real.device) * real).argmax(-1)
