from .reference import attend
__all__ = ["attend"]
