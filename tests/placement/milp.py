"""The solver's oracle: a mixed-integer program over layers and buckets of neurons, for HiGHS."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from hybrid.placement.plan import BUCKET, ON_CPU, LayerPlacement, PlacementPlan
from hybrid.placement.time_model import HOT_NODES, TimeModel, buckets

MIP_GAP = 1e-4  # accepted distance from the optimum, as a share of the predicted time
TIME_LIMIT_S = 20.0


def solve_milp(model: TimeModel, cpu_only: PlacementPlan, budget: int) -> PlacementPlan | None:
    """Solve the mixed-integer program. Return None if nothing fits."""
    program = _Program(model, cpu_only, budget)
    if program.room <= 0:
        return None
    rows, columns, values, lower, upper = program.constraints()
    matrix = coo_matrix((values, (rows, columns)), shape=(len(lower), program.n))
    result = milp(
        program.cost,
        integrality=program.integrality,
        bounds=Bounds(np.zeros(program.n), program.upper),
        constraints=LinearConstraint(matrix.tocsr(), lower, upper),
        options={"mip_rel_gap": MIP_GAP, "time_limit": TIME_LIMIT_S},
    )
    return None if result.x is None else program.read(result.x)


class _Program:
    """The mixed-integer program.

    Each layer has three exclusive choices: whole, split with all gates, or split with the gates of
    hot neurons only. Continuous variables are the hot share of each bucket, and the FFN times,
    which are maxima over both devices.
    """

    def __init__(self, model: TimeModel, cpu_only: PlacementPlan, budget: int) -> None:
        self.model, self.cpu_only = model, cpu_only
        self.steps = buckets(cpu_only.n_neurons)
        self.n_layers, n_steps = len(cpu_only.layers), len(self.steps)
        # A layer's variables: its choices, the buckets of both splits, its FFN's time, and the
        # switches of the residual stream to the GPU (up) and to the CPU (down) before it.
        self.width = 3 + 2 * n_steps + 3
        self.n = self.n_layers * self.width + 3  # the head's choice and the switches before it
        self.room = budget - model.sizes.buffers()
        self.cost, self.upper = np.zeros(self.n), np.ones(self.n)
        self.integrality = np.zeros(self.n)
        self._rows: list[tuple[dict[int, float], float, float]] = []
        memory: dict[int, float] = {}
        for layer in range(self.n_layers):
            self._layer(layer, memory)
        self._head(memory)
        # Units are MiB and microseconds, so that coefficients are near one.
        self._add({i: b / 2**20 for i, b in memory.items()}, -np.inf, self.room / 2**20)

    def _at(self, layer: int, index: int) -> int:
        return layer * self.width + index

    def _add(self, row: dict[int, float], lower: float, upper: float) -> None:
        self._rows.append((row, lower, upper))

    def _layer(self, layer: int, memory: dict[int, float]) -> None:
        model, sizes, n = self.model, self.model.sizes, self.cpu_only.n_neurons
        gpu = model.machine.gpu
        assert gpu is not None
        n_steps = len(self.steps)
        whole, all_gates, own_gates = (self._at(layer, i) for i in range(3))
        with_gates = [self._at(layer, 3 + j) for j in range(n_steps)]
        with_own = [self._at(layer, 3 + n_steps + j) for j in range(n_steps)]
        time, up, down = (self._at(layer, 3 + 2 * n_steps + i) for i in range(3))
        self.integrality[[whole, all_gates, own_gates]] = 1
        self.upper[time] = np.inf

        on_cpu = model.layer(layer, ON_CPU).total * 1e6
        self.cost[whole] = model.layer(layer, LayerPlacement(True, n, n)).total * 1e6 - on_cpu
        for split, gates in ((all_gates, n), (own_gates, 0)):
            bare = model.layer(layer, LayerPlacement(True, gates, 0))
            self.cost[split] = (bare.before + bare.after) * 1e6 - on_cpu
        self.cost[time] = 1.0

        memory[whole] = sizes.layer(LayerPlacement(True, n, n))
        memory[all_gates] = sizes.layer(LayerPlacement(True, n, 0))
        memory[own_gates] = sizes.layer(LayerPlacement(True, 0, 0))
        self._add({whole: 1.0, all_gates: 1.0, own_gates: 1.0}, 0.0, 1.0)

        hot_time, cold_time = {time: 1.0}, {time: 1.0}
        # Cost of the CPU's segment, hand-off included, if no neuron is hot.
        for split, gates in ((all_gates, n), (own_gates, 0)):
            bare = model.layer(layer, LayerPlacement(True, gates, 0))
            cold_time[split] = -bare.cold * 1e6
            hot_time[split] = -HOT_NODES * gpu.node_us
        for j, (first, last) in enumerate(self.steps):
            hot = model.hot_rows(layer, first, last) * 1e6
            cold = model.cold_rows(layer, first, last) * 1e6
            gates_saved = model.cold_gates(layer, first, last) * 1e6
            gates_cost = (last - first) * sizes.neuron / gpu.stream_gbs * 1e-3
            rows = 2 * (last - first) * sizes.neuron
            for bucket, split, is_own in (
                (with_gates[j], all_gates, False),
                (with_own[j], own_gates, True),
            ):
                self._add({bucket: 1.0, split: -1.0}, -1.0, 0.0)
                hot_time[bucket] = -hot
                cold_time[bucket] = cold + (gates_saved if is_own else 0.0)
                memory[bucket] = rows + (rows / 2 if is_own else 0)
                self.cost[bucket] = gates_cost if is_own else 0.0
        self._add(hot_time, 0.0, np.inf)
        self._add(cold_time, 0.0, np.inf)
        before = [] if layer == 0 else [self._at(layer - 1, i) for i in range(3)]
        self._switch([whole, all_gates, own_gates], before, up, down)

    def _head(self, memory: dict[int, float]) -> None:
        head, up, down = self.n - 3, self.n - 2, self.n - 1
        self.integrality[head] = 1
        self.cost[head] = (self.model.head(True) - self.model.head(False)) * 1e6
        memory[head] = self.model.sizes.head
        self._switch([head], [self._at(self.n_layers - 1, i) for i in range(3)], up, down)

    def _switch(self, here: list[int], before: list[int], up: int, down: int) -> None:
        """Add the constraints up >= here - before and down >= before - here."""
        self.cost[[up, down]] = self.model.switch * 1e6
        difference = {i: 1.0 for i in here} | {i: -1.0 for i in before}
        self._add({up: 1.0} | {i: -v for i, v in difference.items()}, 0.0, np.inf)
        self._add({down: 1.0} | difference, 0.0, np.inf)

    def constraints(
        self,
    ) -> tuple[list[int], list[int], list[float], list[float], list[float]]:
        rows, columns, values = [], [], []
        for index, (row, _, _) in enumerate(self._rows):
            rows += [index] * len(row)
            columns += list(row)
            values += list(row.values())
        return rows, columns, values, [r[1] for r in self._rows], [r[2] for r in self._rows]

    def read(self, x: np.ndarray) -> PlacementPlan:
        """Return the plan of a solution, with hot sets rounded down to buckets."""
        n, n_steps = self.cpu_only.n_neurons, len(self.steps)
        layers = []
        for layer in range(self.n_layers):
            at = x[layer * self.width : (layer + 1) * self.width]
            whole, all_gates, own_gates = at[:3] > 0.5
            if whole:
                layers.append(LayerPlacement(True, n, n))
                continue
            if not (all_gates or own_gates):
                layers.append(ON_CPU)
                continue
            shares = at[3 : 3 + n_steps] if all_gates else at[3 + n_steps : 3 + 2 * n_steps]
            hot = sum((b - a) * s for (a, b), s in zip(self.steps, shares, strict=True))
            n_hot = n if hot > n - 0.5 else int(hot + 1e-6) // BUCKET * BUCKET
            layers.append(LayerPlacement(True, n if all_gates else n_hot, n_hot))
        plan = replace(
            self.cpu_only, layers=tuple(layers), is_head_on_gpu=bool(x[self.n - 3] > 0.5)
        )
        return replace(plan, vram_bytes=self.model.sizes.plan(plan))
