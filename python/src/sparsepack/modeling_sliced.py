"""Models that sparsepack sliced with a basis for each half of a block, for transformers 5.4 or newer.

``sparsepack convert --basis block`` puts a copy of this file beside the weights, so that

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

works where sparsepack is not installed. It needs torch and transformers alone.

How such a model differs from the Llama, Mistral, Qwen2 or OPT of hidden size d that it was (SliceGPT, arXiv
2401.15024):

- ``hidden_size`` is d' < d, the columns that its stream keeps. Heads and MLP have their old sizes.
- Every norm is an RMS norm, OPT's too. Their epsilon is the old one times d / d', for squares that are summed over d
  columns and divided by d'.
- ``attn_shortcut`` and ``mlp_shortcut`` take the stream from one basis to the next, before what the attention or the
  MLP writes is added to it.
- ``exit_size``, if it is there, is the width after the last block, where the output matrix was not sliced. The epsilon
  of the last norm is that of the others times ``hidden_size / exit_size``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


@dataclass(frozen=True)
class Family:
    """What differs between the families: names of modules and configuration keys, biases, positions."""

    architecture: str
    """Class name that sparsepack writes."""
    decoder: bool = False
    """Whether everything but the output matrix is in ``model.decoder`` and not in ``model``."""
    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    final_norm: str = "norm"
    out_proj: str = "o_proj"
    intermediate_size: str = "intermediate_size"
    activation: str = "hidden_act"
    norm_eps: str = "rms_norm_eps"
    gated: bool = True
    """Whether the MLP is ``down_proj(activation(gate_proj(x)) * up_proj(x))``; else ``fc2(activation(fc1(x)))``."""
    position_offset: int | None = None
    """Row of the learned position that belongs to the first token; rotary positions if none."""
    window: bool = False
    """Whether attention may be limited to ``sliding_window`` tokens."""
    qkv_bias: bool | str = False
    """Whether there is a bias, or the key that says so."""
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False


FAMILIES = {
    "sliced_llama": Family(
        "SlicedLlamaForCausalLM", qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "sliced_mistral": Family("SlicedMistralForCausalLM", window=True),
    "sliced_qwen2": Family("SlicedQwen2ForCausalLM", qkv_bias=True),
    "sliced_opt": Family(
        "SlicedOPTForCausalLM",
        decoder=True,
        attn_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        final_norm="final_layer_norm",
        out_proj="out_proj",
        intermediate_size="ffn_dim",
        activation="activation_function",
        norm_eps="norm_eps",
        gated=False,
        position_offset=2,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
    ),
}


class SlicedConfig(PreTrainedConfig):
    """The ``config.json`` of a sliced model: the keys of its family, ``head_dim`` and ``exit_size``."""

    model_type = "sliced"  # of the class; an instance has that of its family
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        model_type = kwargs.get("model_type")
        if model_type not in FAMILIES:
            raise ValueError(f"model_type is {model_type!r} (expected one of {', '.join(FAMILIES)})")
        family = FAMILIES[model_type]
        needed = ["vocab_size", "hidden_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads"]
        needed += ["num_key_value_heads", "head_dim", family.intermediate_size, family.activation, family.norm_eps]
        needed += ["rope_parameters"] if family.position_offset is None else []
        if missing := [key for key in needed if kwargs.get(key) is None]:
            raise ValueError(f"config.json of a {model_type} model has no {missing[0]}")
        if kwargs.get("tie_word_embeddings"):
            raise ValueError("tie_word_embeddings is true, but a sliced model reads and writes in other bases")
        defaults = {"exit_size": None, "use_cache": True, "attention_dropout": 0.0, "dropout": 0.0}
        defaults |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
        kwargs = {**defaults, **kwargs}
        # Where there is no window these say nothing, yet masks and caches look at them.
        kwargs.pop("layer_types", None)
        kwargs["sliding_window"] = kwargs.get("sliding_window") if family.window else None
        # Spelling of transformers 4 for what `rope_parameters` says.
        kwargs.pop("rope_theta", None)
        kwargs.pop("rope_scaling", None)
        # The base class looks at some of these when it sets the others.
        for key in needed:
            setattr(self, key, kwargs.pop(key))
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in the base class, which wants one ``model_type`` for a class."""
        config, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(config, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Keys of config.json; class and type are those that sparsepack reads."""
        return {**super().to_dict(), "model_type": self.model_type, "architectures": [self.family.architecture]}

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def has_bias(self, rule: bool | str) -> bool:
        return bool(getattr(self, rule, False)) if isinstance(rule, str) else rule

    def width_after(self, block: int) -> int:
        """Columns of the stream after a block."""
        return self.final_width if block + 1 == self.num_hidden_layers else self.hidden_size

    @property
    def final_width(self) -> int:
        """Columns of the stream that the last norm and the output matrix read."""
        width: int = self.exit_size or self.hidden_size
        return width


class SlicedAttention(nn.Module):
    def __init__(self, config: SlicedConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = index
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = 1 / math.sqrt(config.head_dim)
        self.is_causal = True
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        bias = config.has_bias(config.family.qkv_bias)
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        out = nn.Linear(queries, config.hidden_size, bias=config.has_bias(config.family.out_bias))
        self.add_module(config.family.out_proj, out)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: Any,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*x.shape[:-1], -1, self.head_dim)
        query, key, value = (read(x).view(heads).transpose(1, 2) for read in (self.q_proj, self.k_proj, self.v_proj))
        if rotary is not None:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        window = self.config.sliding_window
        mixed, weights = attend(
            self, query, key, value, attention_mask,
            dropout=dropout, scaling=self.scaling, sliding_window=window, **kwargs,
        )  # fmt: skip
        write = self.get_submodule(self.config.family.out_proj)
        return write(mixed.reshape(*x.shape[:-1], -1).contiguous()), weights


class GatedMLP(nn.Module):
    def __init__(self, config: SlicedConfig, out: int) -> None:
        super().__init__()
        inner, bias = getattr(config, config.family.intermediate_size), config.has_bias(config.family.mlp_bias)
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, out, bias=bias)
        self.activation = ACT2FN[getattr(config, config.family.activation)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class SlicedBlock(GradientCheckpointingLayer):
    def __init__(self, config: SlicedConfig, index: int) -> None:
        super().__init__()
        family, width, after = config.family, config.hidden_size, config.width_after(index)
        self.family, self.dropout = family, config.dropout
        for norm in (family.attn_norm, family.mlp_norm):
            self.add_module(norm, LlamaRMSNorm(width, getattr(config, family.norm_eps)))
        self.self_attn = SlicedAttention(config, index)
        self.attn_shortcut = nn.Linear(width, width, bias=False)
        if family.gated:
            self.mlp = GatedMLP(config, after)
        else:
            inner, bias = getattr(config, family.intermediate_size), config.has_bias(family.mlp_bias)
            self.fc1 = nn.Linear(width, inner, bias=bias)
            self.activation = ACT2FN[getattr(config, family.activation)]
            self.fc2 = nn.Linear(inner, after, bias=bias)
        self.mlp_shortcut = nn.Linear(width, after, bias=False)

    def forward(self, stream: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        written, _ = self.self_attn(self.get_submodule(self.family.attn_norm)(stream), **kwargs)
        stream = self.attn_shortcut(stream) + self.dropped(written)
        x = self.get_submodule(self.family.mlp_norm)(stream)
        written = self.mlp(x) if self.family.gated else self.fc2(self.activation(self.fc1(x)))
        return self.mlp_shortcut(stream) + self.dropped(written)

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, p=self.dropout, training=self.training)


class SlicedPreTrainedModel(PreTrainedModel):
    config_class = SlicedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SlicedBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_record_outputs = {"hidden_states": SlicedBlock, "attentions": SlicedAttention}  # noqa: RUF012


class SlicedModel(SlicedPreTrainedModel):
    """Token ids to what the output matrix reads."""

    def __init__(self, config: SlicedConfig) -> None:
        super().__init__(config)
        family = config.family
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if family.position_offset is None:
            self.rotary_emb = LlamaRotaryEmbedding(config=config)
        else:
            rows = config.max_position_embeddings + family.position_offset
            self.embed_positions = nn.Embedding(rows, config.hidden_size)
        self.layers = nn.ModuleList(SlicedBlock(config, index) for index in range(config.num_hidden_layers))
        eps = getattr(config, family.norm_eps) * config.hidden_size / config.final_width
        self.add_module(family.final_norm, LlamaRMSNorm(config.final_width, eps))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        stream = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self.positions(stream, attention_mask, past_key_values)
        make_mask = create_sliding_window_causal_mask if self.config.sliding_window else create_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=stream,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = None
        if self.config.family.position_offset is None:
            rotary = self.rotary_emb(stream, position_ids=position_ids)
        else:
            stream = stream + self.embed_positions(position_ids + self.config.family.position_offset)
        for block in self.layers:
            stream = block(
                stream, attention_mask=mask, rotary=rotary, past_key_values=past_key_values,
                position_ids=position_ids, **kwargs,
            )  # fmt: skip
        normed = self.get_submodule(self.config.family.final_norm)(stream)
        return BaseModelOutputWithPast(last_hidden_state=normed, past_key_values=past_key_values)

    def positions(self, stream: torch.Tensor, mask: torch.Tensor | None, past: Cache | None) -> torch.Tensor:
        """Positions of the new tokens; learned ones count from the first token that is not padding."""
        seen = past.get_seq_length() if past is not None else 0
        if self.config.family.position_offset is not None and mask is not None and mask.dim() == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
        return (torch.arange(stream.shape[1], device=stream.device) + seen).unsqueeze(0)


class SlicedForCausalLM(SlicedPreTrainedModel, GenerationMixin):
    def __init__(self, config: SlicedConfig) -> None:
        super().__init__(config)
        model = SlicedModel(config)
        self.model = nn.ModuleDict({"decoder": model}) if config.family.decoder else model
        self.lm_head = nn.Linear(config.final_width, config.vocab_size, bias=config.family.head_bias)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in the base class, but a tensor that is not there is an error: it would be random."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"the checkpoint has no {missing[0]}{more}; if it is packed, load it with sparsepack.load, or unpack it"
            )
        return (model, info) if output_loading_info else model

    def get_decoder(self) -> Any:
        return self.model["decoder"] if self.config.family.decoder else self.model

    def get_input_embeddings(self) -> Any:
        return self.get_decoder().embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.get_decoder().embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        # The last so many tokens, or those that are named; 0 means all.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# So that save_pretrained puts this file beside the weights.
SlicedConfig.register_for_auto_class()
SlicedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
