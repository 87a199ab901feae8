"""A package that is also a function: ``nst_det.compare`` holds modules, and ``nst_det.compare(...)`` compares.

Importing ``nst_det.comparison.plan`` makes the package an attribute of ``nst_det``, whatever stood there before.  So
the package itself forwards a call to the function of its name in :mod:`nst_det.api`.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """The class of such a package, set by ``sys.modules[__name__].__class__ = CallablePackage``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function of the same name in :mod:`nst_det.api`."""
        return self._function()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())

    def _function(self) -> Any:
        from nst_det import api

        return getattr(api, self.__name__.rpartition(".")[2])
