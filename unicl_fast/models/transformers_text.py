"""Text encoders of transformers (BERT and its kin), pooled at a token, by mean or by their pooler.

The module is transformers' own, without dropout. Its input is token rows padded with zeros, which
are replaced by the kind's padding id and masked.
"""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unicl_fast.config import ModelConfig

PAD_IDS = {"bert": 0, "distilbert": 0, "roberta": 1, "xlm-roberta": 1, "mpnet": 1}
"""Padding ids by model_type."""
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Our names to transformers'."""
POSITIONS = "network.embeddings.position_embeddings.weight"
_OF_DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}


def field_of(kind: str, name: str) -> str:
    """The name of BERT's config field `name` in `kind`."""
    return _OF_DISTILBERT.get(name, name) if kind == "distilbert" else name


def unused_positions(kind: str) -> int:
    """Rows at the start of a position table that no token uses."""
    return PAD_IDS[kind] + 1 if PAD_IDS[kind] else 0


def type_vocab_size(kind: str) -> int:
    """The number of token types; all tokens have the first."""
    return 2 if kind == "bert" else 1


class TransformersTextEncoder(nn.Module):
    """Token ids to one feature vector for each text, before the projection, as `TextEncoder`."""

    def __init__(self, config: ModelConfig) -> None:
        """Draws initial weights as transformers does; ValueError if it is not installed."""
        super().__init__()
        self.context_length = self.longest = config.context_length
        self.kind, _, self.pooling = config.text_pool.partition(":")
        self.network = _build(config, self.kind, self.pooling)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay, in timm's form."""
        return {
            "stem": r"^network\.embeddings",
            "blocks": [(r"^network\.\w+\.layer\.(\d+)", None), (r"^network", (99999,))],
        }

    def with_padding(self, tokens: Int[Tensor, "u l"]) -> tuple[Tensor, Bool[Tensor, "u l"]]:
        """Tokens with the kind's padding id, and a mask of the real tokens."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        last = ((tokens != 0) * positions).amax(dim=1, keepdim=True)
        is_text = positions <= last
        return torch.where(is_text, tokens, PAD_IDS[self.kind]), is_text

    def forward(
        self, tokens: Int[Tensor, "u l"], num_tokens: int | None = None
    ) -> Float[Tensor, "u w"]:
        """Features of texts; `num_tokens` is ignored, since padding is always computed."""
        if tokens.shape[1] > self.longest:
            raise ValueError(
                f"texts have {tokens.shape[1]} tokens, the text encoder accepts {self.longest}: "
                "tokenize with its context length"
            )
        tokens, is_text = self.with_padding(tokens)
        # four dimensions, which transformers uses as is: for fewer it reads the device
        mask = is_text[:, None, None]
        if self.network.config._attn_implementation == "eager":  # needs an additive mask
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        output = self.network(input_ids=tokens, attention_mask=mask)
        if self.pooling == "pooler":
            return output.pooler_output  # type: ignore[no-any-return]
        states = output.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]  # type: ignore[no-any-return]
        summed = (states * is_text[:, :, None]).sum(dim=1)
        return summed / is_text.sum(dim=1, keepdim=True)  # type: ignore[no-any-return]


def _build(config: ModelConfig, kind: str, pooling: str) -> Any:
    installed = find_spec("transformers") and version("transformers")
    if not installed or int(installed.partition(".")[0]) < 5:
        raise ValueError(
            f"model.text_pool={config.text_pool} is an encoder of the package transformers, of "
            f"which {installed or 'none'} is installed: pip install 'transformers>=5'"
        )
    import transformers  # takes seconds

    fields = {
        "hidden_size": config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "intermediate_size": int(config.text_width * config.text_mlp_ratio),
        "hidden_act": ACTIVATIONS[config.text_activation],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    settings = transformers.AutoConfig.for_model(
        kind,
        **{field_of(kind, name): value for name, value in fields.items()},
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length + unused_positions(kind),
        layer_norm_eps=config.text_norm_eps,
        pad_token_id=PAD_IDS[kind],
        type_vocab_size=type_vocab_size(kind),
    )
    pooler = {} if kind == "distilbert" else {"add_pooling_layer": pooling == "pooler"}
    return transformers.AutoModel.from_config(settings, **pooler)
