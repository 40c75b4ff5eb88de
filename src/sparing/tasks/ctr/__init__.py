"""Tasks on tables: will it be clicked, will it be late?"""

from sparing.tasks.ctr.base import ClickThrough

__all__ = ["ClickThrough"]
