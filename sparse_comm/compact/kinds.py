"""What compact modules of particular kinds need besides: RNNs, and Hugging Face models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_comm.compact.slot import Slot

__all__ = ["CompactPretrained", "CompactRNN"]


class CompactRNN:
    """For RNNs, which keep a second list of their weights: it is read off the attributes."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        pass

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN's flat buffer would alias weights that live for one use only."""


class CompactPretrained:
    """For Hugging Face models, which would write values as if they were weights."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Write the dense model, as an ordinary one would."""
        from sparse_comm.compact.state import expand_state

        state = kwargs.pop("state_dict", None)
        if state is None:
            state = self.state_dict()  # type: ignore[attr-defined]
        dense = expand_state(self, state)  # type: ignore[arg-type]
        return super().save_pretrained(*args, state_dict=dense, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Refused for compact embeddings and heads: the new rows would have no mask."""
        model: Any = self
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            slot: Slot | None = getattr(module, "_compact", {}).get("weight")
            if slot is not None and (
                args or kwargs or new_num_tokens not in (None, slot.pattern.shape[0])
            ):
                raise RuntimeError(
                    f"cannot resize compact parameter {slot.name!r}: call sparse_comm."
                    "densify(model) first, resize, and compact with masks of the new shape"
                )
        return super().resize_token_embeddings(  # type: ignore[misc]
            new_num_tokens, *args, **kwargs
        )
