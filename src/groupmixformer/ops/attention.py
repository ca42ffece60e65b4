"""The door to the operations of Group-Mix Attention."""

from .reference import attend


__all__ = ["attend"]
