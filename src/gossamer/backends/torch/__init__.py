"""The torch backend: the definition of every verb, obvious and slow, beside which all others are tested."""

from gossamer.backends.torch.attend import check_inputs, execute

__all__ = ["check_inputs", "execute"]
