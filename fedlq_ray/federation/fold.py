"""Sums the payloads of a step."""

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedlq_ray.errors import ClientError, FedLQError, PayloadError
from fedlq_ray.federation.task import Job, Task
from fedlq_ray.quantization import decode
from fedlq_ray.quantization.wire import Sent
from fedlq_ray.training.local import Reply
from fedlq_ray.training.payloads import MEMORIES, PAYLOADS

Key = tuple[int, int]  # of a job: dispatch, client


class Fold:
    """Folds payloads into the average as they arrive, summed in the order of the jobs; it decodes one at a time.

    Args:
        jobs: of the flights that the step takes, in the order of summation.
        models: the model that each job's payload is compared with (`strategy.payload=model`).
        shares: each job's share of the sum.
        tracked: the server's EF21 vector of each client; `self.tracked` has it after the step.
        last: the last mean update (d,), from which CAFe's clients send the difference.
        discounts: factors of the shares for staleness; None: ones. Shares are not scaled up in return.
        step: for messages.
    """

    def __init__(
        self,
        task: Task,
        jobs: Sequence[Job],
        models: Sequence[Tensor],
        shares: Sequence[float],
        tracked: Mapping[int, Tensor],
        last: Tensor,
        discounts: Sequence[float] | None = None,
        step: int = 0,
    ) -> None:
        self.jobs, self.models, self.shares, self.tracked = jobs, models, shares, dict(tracked)
        self.last, self.discounts, self.step = last, discounts or [1.0] * len(jobs), step
        self.decode_s = 0.0  # wall seconds of decoding and summing
        self.custom, self.skip = task.quantizer, task.config.clients.on_failure == "skip_client"
        self.update = torch.zeros(task.layers[-1].stop, dtype=torch.float64)
        self.square_error = 0.0  # sum of p_n^2 |Q(x_n) - x_n|^2
        self.square = 0.0  # sum of p_n^2 |update_n|^2
        self.waiting: dict[Key, Reply | ClientError] = {}
        self.turn = 0  # index of the job whose payload is summed next
        self.replies: dict[Key, Reply] = {}
        self.faults: list[ClientError] = []  # of the skipped clients
        self.sent: list[tuple[Sent, ...]] = []
        self.parameters = sum(layer.size for layer in task.layers if not layer.buffer)
        self.heard = False  # a payload changed a parameter

    @property
    def answered(self) -> float:
        """The sum of the shares of the clients that answered."""
        return sum(s for j, s in zip(self.jobs, self.shares, strict=True) if j.key in self.replies)

    def mean(self) -> Tensor:
        """The mean update (d,) float64, over the clients that did not fail."""
        return self.update * self.whole

    @property
    def whole(self) -> float:
        """The factor by which shares rise to replace failed clients."""
        return sum(self.shares) / self.answered if self.faults and self.answered else 1.0

    @property
    def mean_error(self) -> float:
        """Root mean square error that quantization adds to the mean update, if clients' errors are independent."""
        return self.whole * math.sqrt(self.square_error)

    @property
    def noise(self) -> float | None:
        """`RoundResult.noise` of these payloads."""
        return self.square_error / self.square if self.square else None

    def require_movement(self, alone: bool = False) -> None:
        """Requires that the step changed something.

        Args:
            alone: a step has few clients, so that all of one's payloads may decode to no change.
        Raises:
            FedLQError: no client's training moved its weights, or all payloads decode to no change without error
                feedback, which would send it later.
        """
        if not self.replies:
            return
        where = f"round {self.step}: "
        if not any(reply.moved for reply in self.replies.values()):
            raise FedLQError(
                f"{where}training changed no weight of any of the {len(self.replies)} clients: all gradients are zero, "
                "or steps are below the resolution of float32; look at the model, train.lr and the labels"
            )
        if not self.heard and not alone and not any(job.plan.error_feedback for job in self.jobs):
            raise FedLQError(
                f"{where}all {len(self.replies)} payloads decode to no change, so nothing is learned; give "
                "quantizers more bits, or use strategy.error_feedback=true, which sends what is lost in later rounds"
            )

    @property
    def waits(self) -> bool:
        """Whether replies are still to come."""
        return self.turn < len(self.jobs)

    def take(self, key: Key, reply: Reply | ClientError) -> None:
        """Takes a job's reply, or its final failure. Further replies of the job are ignored.

        Raises:
            ClientError: its payload is rejected.
        """
        started = time.perf_counter()
        self.waiting.setdefault(key, reply)
        self._fold_what_is_due()
        self.decode_s += time.perf_counter() - started

    def _fold_what_is_due(self) -> None:
        while self.turn < len(self.jobs) and self.jobs[self.turn].key in self.waiting:
            job, share = self.jobs[self.turn], self.shares[self.turn] * self.discounts[self.turn]
            model, reply = self.models[self.turn], self.waiting.pop(job.key)
            self.turn += 1
            if isinstance(reply, ClientError):
                self.faults.append(reply)
                continue
            kind, where = job.plan.payload, {"round": job.round, "client": job.client}
            try:
                payload = decode(reply.payload, len(self.update), kind=kind, custom=self.custom, **where)
            except PayloadError as exc:
                fault = ClientError(f"its payload is refused: {exc}", **where)
                if self.skip:
                    self.faults.append(fault)
                    continue
                raise fault from exc
            memory = MEMORIES[job.plan.error_feedback]
            known = self.last if memory.common else self.tracked.get(job.client)
            value, tracked = memory.at_server(payload.vector, known)
            if tracked is not None:
                self.tracked[job.client] = tracked
            change = PAYLOADS[kind].change(value.double(), model)
            self.heard = self.heard or bool(change[: self.parameters].any())
            self.update += share * change
            self.square_error += share**2 * reply.square_error
            self.square += share**2 * reply.square
            self.sent.append(payload.segments)
            self.replies[job.key] = reply
