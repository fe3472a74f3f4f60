"""Weights that change while an engine runs: then steered requests are refused here, with a sentence.

In the workers they would end the engine.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine

from confsteer.runtimes.vllm.front.admission import Admission, admission_to

LOADERS = ("reload_weights", "finish_weight_update")
"""Methods of our workers that raise an error if they load weights that are not the profile's."""
CHECK = "weights_fit_profile"
"""Method of our workers to call after any other, because an extension of the worker may load weights under any name."""


def install() -> None:
    """Follow the calls to the workers of this process's engines."""
    _follow(LLMEngine)
    _follow_async(AsyncLLM)


def _follow(engine: Any) -> None:
    call, wake = engine.collective_rpc, engine.wake_up

    def check(self: Any, admission: Admission) -> None:
        # Wait until they wake up: sleeping workers may have no weights to look at.
        admission.weights_unchecked = self.is_sleeping()
        if not admission.weights_unchecked:
            admission.weights_fit = all(call(self, CHECK))

    @functools.wraps(call)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        admission = admission_to(self)
        if admission is None:
            return call(self, method, *args, **kwargs)
        if method in LOADERS:
            admission.weights_fit = False
            result = call(self, method, *args, **kwargs)
            admission.weights_fit = True
            return result
        try:
            return call(self, method, *args, **kwargs)
        finally:
            check(self, admission)

    @functools.wraps(wake)
    def wake_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, admission = wake(self, *args, **kwargs), admission_to(self)
        if admission is not None and admission.weights_unchecked:
            check(self, admission)
        return result

    engine.collective_rpc, engine.wake_up = collective_rpc, wake_up


def _follow_async(engine: Any) -> None:
    """Do the same for an engine with async methods."""
    call, wake = engine.collective_rpc, engine.wake_up

    async def check(self: Any, admission: Admission) -> None:
        admission.weights_unchecked = await self.is_sleeping()
        if not admission.weights_unchecked:
            admission.weights_fit = all(await call(self, CHECK))

    @functools.wraps(call)
    async def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        admission = admission_to(self)
        if admission is None:
            return await call(self, method, *args, **kwargs)
        if method in LOADERS:
            admission.weights_fit = False
            result = await call(self, method, *args, **kwargs)
            admission.weights_fit = True
            return result
        try:
            return await call(self, method, *args, **kwargs)
        finally:
            await check(self, admission)

    @functools.wraps(wake)
    async def wake_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, admission = await wake(self, *args, **kwargs), admission_to(self)
        if admission is not None and admission.weights_unchecked:
            await check(self, admission)
        return result

    engine.collective_rpc, engine.wake_up = collective_rpc, wake_up
