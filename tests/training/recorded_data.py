"""A data set over a store and a predictor, in a module that worker processes can import."""

from __future__ import annotations

import torch
from small_training import SCHEDULE, SIGMAS, STEPS
from torch import Tensor
from torch.utils.data import Dataset

from lesa_kernels import LesaPredictor, Session
from lesa_kernels.training import FeatureStore
from lesa_kernels.trajectories import ModelCall


class Recorded(Dataset[Tensor]):
    """Runs of a store, the forecasts of a predictor's plan for them, and those of its own call."""

    def __init__(self, store: FeatureStore, predictor: LesaPredictor) -> None:
        self.store, self.predictor = store, predictor

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, run: int) -> Tensor:
        features: list[Tensor] = []

        def policy(call: ModelCall) -> None:
            features.append(call.blocks().clone())

        self.store.run([run], policy)
        session = Session(self.predictor.plan(SIGMAS, SCHEDULE))
        found = [*features, self.predictor(features, SIGMAS, SIGMAS[-2]).detach()]
        for step in range(STEPS):
            if session.plan.is_full(step):
                session.push(step, features[step])
            else:
                found.append(session.forecast(step).clone())
        return torch.stack(found)
