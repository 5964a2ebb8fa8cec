"""What configurations of Hugging Face say, read so that nothing in them is passed over."""

from collections.abc import Mapping
from typing import Any

# What trains a network, runs it or describes it, and changes nothing of what it computes from the same weights.
_BESIDE = frozenset(
    (
        *('_attn_implementation', '_attn_implementation_autoset', '_name_or_path', 'architectures', 'attention_dropout'),
        *('attention_probs_dropout_prob', 'auto_map', 'bos_token_id', 'chunk_size_feed_forward', 'classifier_dropout'),
        *('cls_token_id', 'dropout', 'dtype', 'eos_token_id', 'finetuning_task', 'gradient_checkpointing'),
        *('hidden_dropout_prob', 'id2label', 'initializer_range', 'is_llama_config', 'label2id', 'mask_token_id'),
        *('max_length', 'max_position_embeddings', 'max_window_layers', 'model_max_length', 'model_type', 'num_labels'),
        *(
            'output_attentions',
            'output_hidden_states',
            'output_past',
            'pad_token_id',
            'prefix',
            'pretraining_tp',
            'problem_type',
        ),
        *('qa_dropout', 'return_dict', 'sep_token_id', 'seq_classif_dropout', 'task_specific_params', 'tokenizer_class'),
        *('torch_dtype', 'torchscript', 'transformers.js_config', 'transformers_version', 'unk_token_id'),
        *('unsloth_fixed', 'unsloth_version', 'use_bfloat16', 'use_cache'),
    )
)
_NOTHING = (None, False, {}, [], '')


class Configuration:
    """A configuration that remembers what of it was read."""

    def __init__(self, said: Mapping[str, Any], where: str):
        self.said, self.where, self.seen = said, where, set()

    def get(self, name: str, otherwise: Any) -> Any:
        """A value that has a default; null counts as none."""
        self.seen.add(name)
        value = self.said.get(name)
        return otherwise if value is None else value

    def number(self, name: str, otherwise: float | None = None, kind: type = int) -> Any:
        """A number above 0.

        Raises:
          ValueError: it is missing and has no default, or is no such number.
        """
        value = self.get(name, otherwise)
        if value is None:
            raise ValueError(f'{self.where} lacks {name}')
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or not value > 0:
            raise ValueError(
                f'{self.where}: {name} must be {"an integer" if kind is int else "a number"} above 0, got {value!r}'
            )
        return kind(value)

    def switch(self, name: str, otherwise: bool) -> bool:
        """A truth.

        Raises:
          ValueError: it is something else.
        """
        value = self.get(name, otherwise)
        if not isinstance(value, bool):
            raise ValueError(f'{self.where}: {name} must be true or false, got {value!r}')
        return value

    def must_be(self, name: str, wanted: Any, otherwise: Any, module: str) -> None:
        """Refuses what a module cannot do.

        Raises:
          ValueError: a value is another than the one that the module does.
        """
        value = self.get(name, otherwise)
        if value != wanted:
            raise ValueError(f'{self.where}: {name} is {value!r}, and models.{module} does {wanted!r} alone')

    def finish(self, module: str) -> None:
        """Refuses what nobody has read, unless it changes nothing that is computed.

        Raises:
          ValueError: the configuration has keys that are not known.
        """
        unread = sorted(name for name, value in self.said.items() if name not in self.seen | _BESIDE and value not in _NOTHING)
        if unread:
            listed = ', '.join(f'{name} ({self.said[name]!r})'[:80] for name in unread)
            raise ValueError(
                f'{self.where} says what is not known here: {listed}; models.{module} may not do it, '
                'so take out of the file what does not change the outputs'
            )
