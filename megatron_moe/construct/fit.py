"""Solve for routers and ``down`` matrices of a plan, layer by layer, on calibration text.

With the routing fixed, the output of a MoE layer is linear in ``down``, so the best one is a
least-squares solution. Layers are solved in order, each on what the layers before it now give::

    residual --norm--> x --> gains of the experts --regression--> router, priced until balanced
                       x --> activations * combine weights --least squares--> down of all experts
                       x --> the new layer --> residual of the next layer

Every rank holds one layer and its own sequences; only sums cross ranks (`RidgeSums`). Every eighth
sequence is left out of a layer's first solution, chooses the penalty, and gives the errors that are
reported.

Memory per rank, in bytes: 4 * T * D for hidden states (twice that with ``fit_stream``), and about
24 * N^2 + 64 * N * D during a solution, for T tokens and N neurons of a MoE layer.

Shape letters: T tokens, D hidden_size, E experts, F dense neurons, N neurons of the MoE layer,
S positions, B = 1 sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.moe import Moe
from megatron_moe.construct.dense_ffn import (
    DenseFfn,
    combine_weights,
    features,
    plan_neurons,
    router_of,
)
from megatron_moe.construct.finished import FinishedLayer, read_finished, write_finished
from megatron_moe.construct.fit_router import Gains, RouterRegression, balanced_rows, loads
from megatron_moe.construct.measure import world_sum
from megatron_moe.construct.ridge import RidgeSolution, RidgeSums, solve
from megatron_moe.construct.stream import LayerStream
from megatron_moe.data.batches import Batch
from megatron_moe.experts.plan import ExpertPlan, LayerPlan, LayerTable
from megatron_moe.experts.recipe import HELD_OUT_EVERY, PENALTIES
from megatron_moe.experts.solved import read_solved, write_solved
from megatron_moe.hf.reader import SourceCheckpoint

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFit:
    """Result of one layer, for the receipt. Errors are relative to the target, on left-out text."""

    error_before: float
    error_after: float
    penalty: float | None
    """Chosen penalty; None if ``down`` is sliced: not solved for, or no solution was better on
    left-out text."""
    condition: float | None
    """See `RidgeSolution.condition`."""
    max_load: float
    """Load of the busiest expert on all calibration text, in multiples of the mean."""
    load_E: list[float]


@dataclass(slots=True)
class Fit:
    """The fit of all MoE layers, on one rank."""

    plan: ExpertPlan
    """Plan with the tables of its method, which all ranks have."""
    moe: Moe
    dense: SourceCheckpoint
    stream: LayerStream
    batches: list[Batch]
    """This rank's calibration sequences."""
    first: int
    """Index of the first of them over all ranks; the next is ``dist.get_world_size()`` later."""
    folder: Path
    """Folder for solved matrices."""
    _residual: list[Tensor] = field(init=False, default_factory=list)
    _dense_residual: list[Tensor] = field(init=False, default_factory=list)
    _ffn: DenseFfn = field(init=False)

    @torch.no_grad()
    def run(self, progress: Progress) -> tuple[dict[int, LayerTable], dict[int, LayerFit]]:
        """Fit all layers in order; layers that an interrupted run finished are read instead."""
        recipe, tables, fits = self.plan.recipe, dict(self.plan.tables), {}
        self._residual = [self.stream.embed(batch) for batch in self.batches]
        self._dense_residual = list(self._residual) if recipe.fit_stream else []
        layers = self.dense.spec.num_layers
        for layer in range(layers):
            self.stream.load(layer)
            self._ffn = DenseFfn.read(self.dense, layer, self.stream.device)
            self._attend()
            if layer not in recipe.moe_layers:
                self._advance(lambda x_TD: self._ffn.output(x_TD))
            else:
                tables[layer], down_ND, fits[layer] = self._layer(layer, tables.get(layer))
                routed = self._layer_plan(layer, tables[layer])
                self._advance(lambda x_TD, p=routed, d=down_ND: self._output(x_TD, p, d))
            progress(layer + 1, layers)
        return tables, fits

    def _layer(self, layer: int, table: LayerTable | None) -> tuple[LayerTable, Tensor, LayerFit]:
        """Return the table of one layer, its ``down`` ``(N, D)``, and how well it fits."""
        table = table or LayerTable()
        if (finished := read_finished(self.folder, layer)) is not None:
            return self._finished(layer, table, finished)
        if "router" in self.plan.recipe.fit:
            rows = self._fit_router(self._layer_plan(layer, table))
            table = replace(table, router_ED=rows.cpu().numpy())
        plan = self._layer_plan(layer, table)
        sliced_ND = self._sliced(plan)
        down_ND, penalty, condition = sliced_ND, None, None
        if "down" not in self.plan.recipe.fit:
            errors = self._errors(plan, [sliced_ND])
        else:
            solution, penalty, errors = self._fit_down(plan, sliced_ND)
            down_ND, condition = solution.weights_FD, solution.condition
            digest = self._write(layer, down_ND)
            table = replace(table, down_hash=digest)
        load_E = self._loads(plan)
        fit = LayerFit(
            error_before=errors[0], error_after=errors[-1], penalty=penalty, condition=condition,
            max_load=float(load_E.max()), load_E=load_E.tolist(),
        )  # fmt: skip
        record = FinishedLayer(table.router_ED, table.down_hash, asdict(fit))
        write_finished(self.folder, layer, record)
        return table, down_ND.float(), fit

    # ---- text ------------------------------------------------------------------------------------

    def _inputs(self, *, left_out: bool | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield index and FFN input of this rank's sequences: all, left out or not."""
        for index, residual_SBD in enumerate(self._residual):
            out = self._number(index) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            if left_out is None or left_out == out:
                yield index, self.stream.ffn_input(residual_SBD)

    def _number(self, index: int) -> int:
        """Return the number over all ranks of this rank's sequence ``index``."""
        return self.first + index * dist.get_world_size()

    def _attend(self) -> None:
        for streams in (self._residual, self._dense_residual):
            for index, batch in enumerate(self.batches if streams else ()):
                streams[index] = self.stream.attend(streams[index], batch)
        for index, residual_SBD in enumerate(self._dense_residual):
            output_TD = self._ffn.output(self.stream.ffn_input(residual_SBD))
            added_TD = self.stream.added(output_TD)
            self._dense_residual[index] = residual_SBD + added_TD.view_as(residual_SBD)

    def _advance(self, layer: Callable[[Tensor], Tensor]) -> None:
        for index, x_TD in self._inputs():
            residual_SBD = self._residual[index]
            added_TD = self.stream.added(layer(x_TD))
            self._residual[index] = residual_SBD + added_TD.view_as(residual_SBD)

    def _target(self, index: int, output_TD: Tensor) -> Tensor:
        """Return what the MoE layer should give, ``(T, D)``."""
        share = self.plan.recipe.fit_stream
        if not share:
            return output_TD
        missing = self._dense_residual[index] - self._residual[index]
        missing = missing / self.dense.spec.multipliers.residual
        return torch.lerp(output_TD, missing.flatten(0, 1), share)

    # ---- the layer -------------------------------------------------------------------------------

    def _layer_plan(self, layer: int, table: LayerTable) -> LayerPlan:
        return self.plan.with_tables({layer: table}).layer(layer)

    def _output(self, x_TD: Tensor, plan: LayerPlan, down_ND: Tensor) -> Tensor:
        return self._features(x_TD, self._ffn.activations(x_TD), plan) @ down_ND

    def _features(self, x_TD: Tensor, act_TF: Tensor, plan: LayerPlan) -> Tensor:
        weights_TE = combine_weights(x_TD @ router_of(self._ffn, plan).T, self.moe)
        return features(act_TF, weights_TE, plan)

    def _examples(self, plan: LayerPlan, *, left_out: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs of ``down`` ``(T, N)`` and its target ``(T, D)``, by sequence."""
        for index, x_TD in self._inputs(left_out=left_out):
            act_TF = self._ffn.activations(x_TD)
            target_TD = self._target(index, act_TF @ self._ffn.down_DF.T)
            yield self._features(x_TD, act_TF, plan), target_TD

    def _sliced(self, plan: LayerPlan) -> Tensor:
        """Return the dense rows of ``down`` with the plan's factor, ``(N, D)``."""
        rows_ND = self._ffn.down_DF.T[plan_neurons(plan).to(self._ffn.down_DF.device)].clone()
        rows_ND[: plan.neurons_EM.size] *= plan.weight_scales[2] * plan.output_scale
        return rows_ND

    def _fit_router(self, plan: LayerPlan) -> Tensor:
        """Return the router rows, ``(E, D)``, the same on every rank."""
        experts = len(plan.neurons_EM)
        gains = Gains(self._ffn.down_DF, torch.from_numpy(plan.neurons_EM.copy()))
        regression = RouterRegression.zeros(self._ffn.down_DF.shape[0], experts, self.stream.device)
        for index, x_TD in self._inputs():
            act_TF = self._ffn.activations(x_TD)
            y_TD = self._target(index, act_TF @ self._ffn.down_DF.T)
            if len(plan.shared_S):
                shared = torch.from_numpy(plan.shared_S)
                y_TD = y_TD - act_TF[:, shared] @ self._ffn.down_DF[:, shared].T
            regression.add(x_TD, gains.of(act_TF, y_TD))
        rows_ED, one_D = RouterRegression(regression.sums.map_(world_sum)).solve()
        rows_ED, one_D = rows_ED.to(self.stream.device), one_D.to(self.stream.device)
        return balanced_rows(
            rows_ED, one_D, (x_TD for _, x_TD in self._inputs()),
            topk=self.moe.moe_router_topk, max_load=self.plan.recipe.max_load, total=world_sum,
        )  # fmt: skip

    def _fit_down(
        self, plan: LayerPlan, sliced_ND: Tensor
    ) -> tuple[RidgeSolution, float | None, list[float]]:
        """Return the solution, its penalty, and the errors before and after on left-out text."""
        sums = self._down_sums(plan, left_out=False)
        trials = [self._solved(sums, penalty, sliced_ND) for penalty in PENALTIES]
        errors = self._errors(plan, [sliced_ND, *(trial.weights_FD for trial in trials)])
        best = min(range(len(PENALTIES)), key=lambda i: errors[i + 1])
        if errors[0] < errors[best + 1]:  # text that is left out contradicts the fit
            return RidgeSolution(sliced_ND, None), None, [errors[0], errors[0]]
        del trials
        sums = sums.plus(self._down_sums(plan, left_out=True))
        solution = self._solved(sums, PENALTIES[best], sliced_ND)
        return solution, PENALTIES[best], [errors[0], errors[best + 1]]

    def _down_sums(self, plan: LayerPlan, *, left_out: bool) -> RidgeSums:
        neurons, hidden = len(plan_neurons(plan)), self._ffn.down_DF.shape[0]
        sums = RidgeSums.zeros(neurons, hidden, self.stream.device)
        for z_TN, target_TD in self._examples(plan, left_out=left_out):
            sums.add(z_TN, target_TD)
        return sums.map_(world_sum)

    def _solved(self, sums: RidgeSums, penalty: float, sliced_ND: Tensor) -> RidgeSolution:
        """Solve on rank 0, and give the solution to every rank in fp32."""
        down_ND = torch.zeros_like(sliced_ND)
        condition = torch.zeros(1, dtype=torch.float64, device=down_ND.device)
        if dist.get_rank() == 0:
            solution = solve(sums, penalty=penalty, toward_FD=sliced_ND.to(sums.gram_FF.device))
            down_ND.copy_(solution.weights_FD)
            assert solution.condition is not None
            condition.fill_(solution.condition)
        dist.broadcast(down_ND, src=0)
        dist.broadcast(condition, src=0)
        return RidgeSolution(down_ND, float(condition))

    def _errors(self, plan: LayerPlan, candidates: list[Tensor]) -> list[float]:
        """Return the relative error of each candidate for ``down`` on text that was left out."""
        squares = torch.zeros(1 + len(candidates), dtype=torch.float64)
        for z_TN, target_TD in self._examples(plan, left_out=True):
            squares[0] += target_TD.double().square().sum().cpu()
            for i, down_ND in enumerate(candidates, start=1):
                squares[i] += (z_TN @ down_ND - target_TD).double().square().sum().cpu()
        whole, *errors = world_sum(squares).tolist()
        return [(error / whole) ** 0.5 if whole else float("nan") for error in errors]

    def _loads(self, plan: LayerPlan) -> Tensor:
        """Return each expert's load on all text, in multiples of the mean."""
        rows_ED = router_of(self._ffn, plan)
        load_E = torch.zeros(len(rows_ED), dtype=torch.float64, device=self.stream.device)
        for _, x_TD in self._inputs():
            load_E += loads(x_TD @ rows_ED.T, self.moe.moe_router_topk)
        total_E = world_sum(load_E)
        return total_E / total_E.mean()

    def _write(self, layer: int, down_ND: Tensor) -> str:
        digest = [""]
        if dist.get_rank() == 0:
            digest = [write_solved(self.folder, layer, down_ND.float().cpu().numpy())]
        dist.broadcast_object_list(digest, src=0)
        return digest[0]

    def _finished(
        self, layer: int, table: LayerTable, finished: FinishedLayer
    ) -> tuple[LayerTable, Tensor, LayerFit]:
        """Return what an interrupted run found for a layer."""
        rows_ED, digest = finished.router_ED, finished.down_hash
        table = replace(table, router_ED=rows_ED, down_hash=digest)
        plan = self._layer_plan(layer, table)
        if digest is None:
            return table, self._sliced(plan), LayerFit(**finished.fit)
        rows = slice(0, len(plan_neurons(plan)))
        down_ND = torch.from_numpy(read_solved(self.folder, layer, rows)).to(self.stream.device)
        return table, down_ND, LayerFit(**finished.fit)


def fit_table(fits: Mapping[int, LayerFit]) -> str:
    """Return a table of errors and loads by layer, as text."""
    lines = ["layer  error before  after  penalty  busiest expert"]
    for layer, fit in fits.items():
        penalty = "-" if fit.penalty is None else f"{fit.penalty:.0e}"
        lines.append(
            f"{layer:5}  {fit.error_before:12.3f}  {fit.error_after:5.3f}  {penalty:>7}  "
            f"{fit.max_load:.2f} x mean"
        )
    return "\n".join(lines)
