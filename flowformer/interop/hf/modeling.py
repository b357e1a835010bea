"""Models of transformers around :class:`flowformer.models.decoder.TokenDecoder`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
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

from flowformer.core.checks import check_sizes
from flowformer.interop.hf.cache import read_cache, write_cache
from flowformer.interop.hf.configuration import FlowformerConfig
from flowformer.interop.hf.inputs import (
    Packing,
    check_keywords,
    countable_labels,
    find_starts,
    last_token,
    read_mask,
    read_packing,
    read_sizes,
    refuse_packing,
    share_of_labels,
)
from flowformer.models.decoder import LanguageState, TokenDecoder
from flowformer.models.encoder import EncoderBlock
from flowformer.models.initialization import LanguageInit, has_initializer, set_initializer

# The old name of `cache`, which transformers itself understands until then.
_old_cache_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")


class FlowformerBlock(GradientCheckpointingLayer, EncoderBlock):
    """Decoder block with gradient checkpointing of transformers. Arguments as in :class:`EncoderBlock`."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - two base classes, and overloads in one of them
        self, x: Tensor, *, return_state: bool = False, **arguments: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """As :meth:`EncoderBlock.forward`; a single token after a state is computed by ``step``, which is faster."""
        state = arguments.get("initial_state")
        alone = x.shape[1] == 1 and arguments.get("mask") is None
        if alone and state is not None and return_state:
            out, state = self.step(x.squeeze(1), state)
            return out.unsqueeze(1), state
        return super().forward(x, return_state=return_state, **arguments)


class FlowformerPreTrainedModel(PreTrainedModel):
    """Base class of the models: initialization, and the features of transformers that they support."""

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
        """Return False: parameters are initialized like those of transformers, by functions that skip loaded ones."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh parameters of one module, as :class:`flowformer.models.initialization.LanguageInit` draws them.

        transformers replaces the functions of ``torch.nn.init`` meanwhile by ones that leave loaded parameters alone.
        """
        if module is getattr(self, "score", None):
            super()._init_weights(module)
            return
        if isinstance(module, (nn.Linear, nn.Embedding)) and not has_initializer(module):
            # Made by transformers, for another size of the vocabulary.
            set_initializer(module, self._initialization().embedding)
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def _initialization(self) -> LanguageInit:
        config = self.config
        return LanguageInit(config.init, config.hidden_size, config.num_hidden_layers, config.initializer_range)


class FlowformerModel(FlowformerPreTrainedModel, TokenDecoder):
    """The decoder without a head.

    Padding is invisible, on either side: positions count real tokens only, and a row of a batch gives what it gives
    alone.

    Args:
        config: The options.

    Raises:
        ValueError, TypeError: for options that do not fit.
    """

    block_class = FlowformerBlock

    def __init__(self, config: FlowformerConfig) -> None:
        super().__init__(config)
        check_sizes(vocab_size=config.vocab_size, num_hidden_layers=config.num_hidden_layers)
        self.build_decoder(
            config.vocab_size, dim=config.hidden_size, num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads, ffn_dim=cast("int", config.intermediate_size),
            max_length=config.max_position_embeddings, positions=config.positions,
            scale_embedding=config.scale_embedding, norm_first=config.norm_first, activation=config.activation,
            dropout=config.dropout, activation_dropout=config.activation_dropout, attention=config.attention,
            attention_options=config.attention_options, init=config.init, init_std=config.initializer_range,
        )  # fmt: skip
        self.initialization.set_on(self)
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
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute hidden states of tokens, or of their embeddings.

        Several sequences may follow each other in a row (a packed batch, as ``DataCollatorWithFlattening`` makes it):
        each is computed as if it were alone.

        Args:
            input_ids: (batch, length), integers below ``vocab_size``; any at padding.
            attention_mask: (batch, length), or (batch, tokens so far + length) with a cache; 1 or True = a real token,
                padding on either side.
            cache: What came before: a cache that the model returned, or ``DynamicCache(config=config)``. It is updated.
            inputs_embeds: (batch, length, dim), instead of ``input_ids``; as the embedding gives them.
            use_cache: Return the cache; if absent, when one was given, or ``config.use_cache`` outside of training.
                While activations are checkpointed, none is.
            output_attentions: Refused: no mechanism but softmax has a map of weights, and it does not keep it.
            output_hidden_states: Return the embeddings and the outputs of all blocks too, or of those numbered.
            position_ids: (batch, length) or (1, length): they count the real tokens from 0, and do so again where
                another sequence of a packed batch begins.
            **kwargs: Other ways to describe a packed batch: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (sequences + 1,)
                in a batch of size 1, or ``seq_idx`` (batch, length). The other keywords that transformers passes to
                its own models are accepted, and have no effect, as there.

        Returns:
            ``last_hidden_state`` (batch, length, dim), zeros at padding; ``cache``; ``hidden_states``.

        Raises:
            ValueError, TypeError: for invalid input, or a sequence beyond the learned positions.
        """
        check_keywords(kwargs)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions is not supported: a Flowformer has no attention weights to return")
        sizes = read_sizes(input_ids, inputs_embeds)
        before = read_cache(cache, self.config.num_hidden_layers, sizes[0])
        seen = 0 if cache is None else cache.get_seq_length()
        real = read_mask(attention_mask, *sizes, seen, before)
        packing = read_packing(position_ids, kwargs, sizes, real, before)
        cache = self._prepare_cache(cache, use_cache, packing)
        if input_ids is not None:
            x = self.embed_tokens(input_ids, real, name="input_ids")
        else:
            x = cast("Tensor", inputs_embeds)
            x = x if real is None else x.masked_fill(~real.unsqueeze(-1), 0)
        hidden_wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if packing is not None:
            return BaseModelOutputWithPast(last_hidden_state=self._decode_packed(x, packing, bool(hidden_wanted)))
        if cache is not None:
            return BaseModelOutputWithPast(last_hidden_state=self._extend(x, real, before, cache), cache=cache)
        # The decoder packs a padded batch, which is faster, but changes the shape between its blocks.
        return BaseModelOutputWithPast(
            last_hidden_state=self.decode(x, real, before, return_state=bool(hidden_wanted))[0]
        )

    def _extend(self, x: Tensor, real: Tensor | None, state: LanguageState | None, cache: Cache) -> Tensor:
        """Hidden states of embeddings (batch, length, dim) after a state; the cache is updated."""
        # An assistant takes back tokens, down to the last but one of its input, whose state the cache must have seen.
        alone = 1 if cache.is_recording_past(0) else x.shape[1]
        sizes = [x.shape[1]] if alone >= x.shape[1] else [x.shape[1] - alone, alone]
        masks = [None] * len(sizes) if real is None else real.split(sizes, 1)
        parts = []
        for part, mask in zip(x.split(sizes, 1), masks, strict=True):
            out, state = self.decode(part, mask, state, return_state=True)
            write_cache(cache, cast("LanguageState", state), part.shape[1])
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _decode_packed(self, x: Tensor, packing: Packing, hidden_wanted: bool) -> Tensor:
        """Hidden states of embeddings (batch, length, dim) of several sequences a row; zeros at padding."""
        if hidden_wanted and (len(x) > 1 or packing.tokens is not None):
            raise ValueError("output_hidden_states is not supported with several packed rows: pass them in one row")
        rows = x.flatten(0, 1)
        packed = rows if packing.tokens is None else rows.index_select(0, packing.tokens)
        packed = self.add_positions(packed.unsqueeze(0), packing.positions)
        for block in self.decoder.layers:
            packed = block(packed, cu_seqlens=packing.cu_seqlens)
        packed = self.decoder.norm(packed).squeeze(0)
        if packing.tokens is not None:
            packed = packed.new_zeros(rows.shape).index_copy(0, packing.tokens, packed)
        return packed.view(x.shape)

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None, packing: Packing | None) -> Cache | None:
        """The cache to continue from, if any."""
        if packing is not None:
            if cache is not None or use_cache:
                raise ValueError("use_cache is not supported with packed sequences: a cache holds one state a row")
            return None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("use_cache is not supported with gradient checkpointing: disable one of the two")
            return None
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if cache is not None and not use_cache:
            raise ValueError("use_cache=False is not supported with past_key_values: a cache that is passed is updated")
        return DynamicCache(config=self.config) if use_cache and cache is None else cache


class FlowformerForCausalLM(FlowformerPreTrainedModel, GenerationMixin):
    """The decoder with a language modeling head.

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
        set_initializer(self.lm_head, self.model.initialization.embedding)
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
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the next token at each position.

        Args:
            input_ids: As in :meth:`FlowformerModel.forward`, as are the next three and ``use_cache``.
            attention_mask: As there.
            cache: As there.
            inputs_embeds: As there.
            labels: (batch, length): the tokens again, or -100 for those that do not count. They are shifted here. Those
                at padding do not count, nor does the first token of a sequence, which nothing precedes.
            use_cache: As there.
            logits_to_keep: Score the last so many positions only (0: all), or those numbered; not with ``labels``.
            position_ids: As there.
            **kwargs: ``num_items_in_batch`` to divide the loss by, ``shift_labels`` that are shifted already, and the
                other arguments of :meth:`FlowformerModel.forward`.

        Returns:
            ``logits`` (batch, length, vocab_size), undefined at padding; ``loss`` with labels; ``cache``;
            ``hidden_states``.

        Raises:
            ValueError, TypeError: as :meth:`FlowformerModel.forward`; for labels of another shape.
        """
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        sizes = read_sizes(input_ids, inputs_embeds)
        if labels is not None:
            starts = find_starts(position_ids, kwargs, sizes)
            given = labels
            labels = countable_labels(labels, attention_mask, sizes, logits_to_keep, starts, self.config.vocab_size)
            if loss_arguments.get("num_items_in_batch") is not None:
                loss_arguments["num_items_in_batch"] *= share_of_labels(given, labels)
        out = self.model(
            input_ids, attention_mask, cache, inputs_embeds, use_cache, position_ids=position_ids, **kwargs
        )
        logits = self.lm_head(slice_logits_to_keep(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_arguments)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=out.cache, hidden_states=out.hidden_states)

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """No positions: the model counts the real tokens of the mask itself."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not mask[:, -1].all():  # the next token would be that of padding
            rows = (mask[:, -1] == 0).nonzero().flatten().tolist()
            raise ValueError(f"prompts must be padded on the left, got padding behind the last token of rows {rows}")
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is not supported, since a Flowformer has its own cache; got {kind!r}"
            )
        return cast("Any", super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class FlowformerForSequenceClassification(FlowformerPreTrainedModel):
    """The decoder with a sequence classification or regression head on the last real token.

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
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Compute class logits.

        Args:
            input_ids: As in :meth:`FlowformerModel.forward`, as are the next three and ``use_cache``.
            attention_mask: As there. Without one, the last token is the last that is not ``config.pad_token_id``.
            cache: As there.
            inputs_embeds: As there.
            labels: (batch,) classes or numbers, or (batch, num_labels) as ``config.problem_type`` has it.
            use_cache: As there.
            position_ids: As there, but one sequence a row.
            **kwargs: ``num_items_in_batch``, the number of labels that the loss is a mean over, of which these may be a
                part; and the other arguments of :meth:`FlowformerModel.forward`.

        Returns:
            ``logits`` (batch, num_labels); ``loss`` with labels; ``cache``; ``hidden_states``.

        Raises:
            ValueError, TypeError: as :meth:`FlowformerModel.forward`.
        """
        batch, length = read_sizes(input_ids, inputs_embeds)
        count = kwargs.pop("num_items_in_batch", None)
        out = self.model(
            input_ids, attention_mask, cache, inputs_embeds, use_cache, position_ids=position_ids, **kwargs
        )
        refuse_packing(find_starts(position_ids, kwargs, (batch, length)), attention_mask)
        hidden = out.last_hidden_state
        last = last_token(input_ids, attention_mask, length, self.config.pad_token_id)
        logits = self.score(hidden[:, -1] if last is None else hidden[torch.arange(batch, device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if count is not None:  # of all labels of an optimizer's step, of which this batch is a part
                loss = loss * (labels != -100).sum() / count
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, cache=out.cache, hidden_states=out.hidden_states
        )
