//! One block: capture the inputs of its linears, solve them, carry the compressed activations on.
//!
//! The staged order (`--sequential true`) stops at each capture point: every batch is brought to
//! the point, the linears that share it are solved, and their compressed outputs feed the next
//! point. That is one forward pass for a block. The block order captures everything on the dense
//! block and then replays it compressed: two passes, as the reference implementation does.

use std::time::Instant;

use sparsepack_formats::FormatError;

use super::{
    budget::{factor_flops, form_flops, forward_flops, gram_flops, sweep_flops},
    error::{PipelineError, Result},
    loader::{LoadedBlock, LoadedLinear, LoadedWeight},
    plan::{BlockPlan, LayerPlan},
    progress::{Phase, PhaseTimes, Progress},
};
use crate::{
    backend::{Backend, BackendError, SequenceLens},
    calibration::{HiddenStates, Kept, Parked, StatKind, Statistic},
    compress::{Layer, LayerReport, Method, Quantizer, SolveTimes, Solved, SolverOptions, solver},
    model::{
        Activations, Architecture, Block, BlockGeometry, CapturePoint, ModelConfig, ModelSource,
    },
    recipe::Sequential,
};

/// What solving blocks needs besides the block.
pub(super) struct StageContext<'a, B: Backend> {
    /// The device.
    pub backend: &'a B,
    /// The family, for operation counts.
    pub arch: &'a Architecture,
    /// Dimensions, for operation counts.
    pub config: &'a ModelConfig,
    /// What does not change from block to block.
    pub geometry: &'a BlockGeometry,
    /// Settings of the solvers.
    pub options: SolverOptions,
    /// Order of capture and solving.
    pub sequential: Sequential,
    /// Told as batches pass.
    pub progress: &'a dyn Progress,
}

/// Part of a block that a pass runs.
#[derive(Debug, Clone, Copy)]
struct Span {
    /// The point whose input the activations hold; the start of the block when `None`.
    from: Option<CapturePoint>,
    /// The point whose input they shall hold; the end of the block when `None`.
    to: Option<CapturePoint>,
}

impl Span {
    /// The first point whose linears are applied.
    fn first(self) -> CapturePoint {
        self.from.unwrap_or(CapturePoint::AttnIn)
    }

    /// Position after the last one.
    fn end(self) -> usize {
        self.to.map_or(CapturePoint::ALL.len(), |point| point as usize)
    }
}

/// Fraction of calibration tokens that may be non-finite before the run stops (a tenth, as
/// exllamav3's converter allows).
const MAX_NON_FINITE: usize = 10;

impl<B: Backend> StageContext<'_, B> {
    /// Solves the planned layers of a block without activations (magnitude).
    ///
    /// # Errors
    /// As the solver.
    pub(super) fn solve_data_free(
        &self,
        plan: &BlockPlan,
        loaded: &mut LoadedBlock<B>,
        times: &mut PhaseTimes,
    ) -> Result<Vec<LayerReport>> {
        let mut reports = Vec::new();
        for point in CapturePoint::ALL {
            let features = self.config.capture_width(point);
            let mut nothing = Statistic::new(self.backend, StatKind::None, features)?;
            reports.extend(self.solve_point(plan, loaded, point, &mut nothing, times)?);
        }
        Ok(reports)
    }

    /// Captures, solves and carries `hidden` on to the next block. `finish` is called with each
    /// linear of a point once it has its final values, before they are used.
    ///
    /// # Errors
    /// As the solver, `finish`, or the store of activations.
    pub(super) fn solve_block(
        &self,
        plan: &BlockPlan,
        loaded: &mut LoadedBlock<B>,
        hidden: &mut HiddenStates<B>,
        times: &mut PhaseTimes,
        mut finish: impl FnMut(&mut LoadedBlock<B>, CapturePoint, &mut PhaseTimes) -> Result<()>,
    ) -> Result<Vec<LayerReport>> {
        let mut reports = Vec::new();
        let captured = match self.sequential {
            Sequential::Block if plan.needs() > StatKind::None => {
                Some(self.capture_block(plan, loaded, hidden, times)?)
            }
            _ => None,
        };
        let mut captured = captured.map(Vec::into_iter);
        // Where the activations in `hidden` stand: at this point, with its linears not applied.
        let mut at = None;
        for point in CapturePoint::ALL {
            let mut statistic = match &mut captured {
                Some(statistics) => statistics.next(),
                None => None,
            };
            if statistic.is_none() {
                let kind = plan.needs_at(point);
                let mut fresh = self.statistic(kind, point)?;
                if kind > StatKind::None {
                    let span = Span { from: at, to: Some(point) };
                    self.pass(plan, &loaded.block, hidden, times, span, |b, x| fresh.add(b, x))?;
                    at = Some(point);
                }
                statistic = Some(fresh);
            }
            let Some(mut statistic) = statistic else { continue };
            check_finite(plan.index, &statistic)?;
            reports.extend(self.solve_point(plan, loaded, point, &mut statistic, times)?);
            drop(statistic);
            finish(loaded, point, times)?;
            times.time(Phase::Load, || loaded.install(self.backend, point))?;
        }
        let rest = Span { from: at, to: None };
        self.pass(plan, &loaded.block, hidden, times, rest, |_, _| Ok(()))?;
        Ok(reports)
    }

    /// Solves the layers of a block by each of several plans, on the activations of the dense model,
    /// which `hidden` then carries on to the next block. Returns the reports of each plan; nothing is
    /// kept of the weights.
    ///
    /// # Errors
    /// As [`solve_block`](Self::solve_block).
    pub(super) fn measure_block(
        &self,
        plans: &[&BlockPlan],
        source: &ModelSource,
        hidden: &mut HiddenStates<B>,
        times: &mut PhaseTimes,
    ) -> Result<Vec<Vec<LayerReport>>> {
        let index = plans[0].index;
        let mut loaded = LoadedBlock::load(self.backend, source, index)?;
        let mut reports = vec![Vec::new(); plans.len()];
        let mut at = None;
        for point in CapturePoint::ALL {
            let mut statistic = self.statistic(StatKind::Hessian, point)?;
            let span = Span { from: at, to: Some(point) };
            self.pass(plans[0], &loaded.block, hidden, times, span, |b, x| statistic.add(b, x))?;
            at = Some(point);
            check_finite(index, &statistic)?;
            for (plan, reports) in plans.iter().zip(&mut reports) {
                let solved = self.solved_at(plan, &loaded, point, &mut statistic, times)?;
                reports.extend(solved.into_iter().map(|(_, solved)| solved.report));
            }
            loaded.install(self.backend, point)?;
        }
        let rest = Span { from: at, to: None };
        self.pass(plans[0], &loaded.block, hidden, times, rest, |_, _| Ok(()))?;
        Ok(reports)
    }

    /// Runs the dense block over every batch, collecting all statistics; `hidden` is unchanged.
    fn capture_block(
        &self,
        plan: &BlockPlan,
        loaded: &mut LoadedBlock<B>,
        hidden: &mut HiddenStates<B>,
        times: &mut PhaseTimes,
    ) -> Result<Vec<Statistic<B>>> {
        let b = self.backend;
        times.time(Phase::Load, || loaded.install_all(b))?;
        let mut statistics: Vec<Statistic<B>> = CapturePoint::ALL
            .into_iter()
            .map(|point| self.statistic(plan.needs_at(point), point))
            .collect::<Result<_>>()?;
        for batch in 0..hidden.batches() {
            let lens = hidden.lens(batch).clone();
            let kept = hidden.take(batch)?;
            let residual = kept.residual.copy(b)?;
            hidden.put(b, batch, kept)?;
            let start = Instant::now();
            let mut observing = 0.0;
            loaded.block.forward(b, self.geometry, residual, &lens, |point, x| {
                let start = Instant::now();
                let added = statistics[point as usize].add(b, x).map_err(PipelineError::from);
                observing += start.elapsed().as_secs_f64();
                added
            })?;
            hidden.carry(b, &[batch + 1])?;
            let gram = CapturePoint::ALL.map(|point| self.statistic_flops(plan, point, &lens));
            times.charge(Phase::Statistics, observing, gram.iter().sum());
            let flops = forward_flops(
                self.arch,
                self.config,
                CapturePoint::AttnIn,
                CapturePoint::ALL.len(),
                &lens,
            );
            times.charge(Phase::Forward, start.elapsed().as_secs_f64() - observing, flops);
            self.progress.advance(1);
        }
        Ok(statistics)
    }

    /// Brings every batch across `span` and shows it to `observe`, in order, where it arrives.
    fn pass(
        &self,
        plan: &BlockPlan,
        block: &Block<B>,
        hidden: &mut HiddenStates<B>,
        times: &mut PhaseTimes,
        span: Span,
        mut observe: impl FnMut(&B, &B::Matrix) -> std::result::Result<(), BackendError>,
    ) -> Result<()> {
        let b = self.backend;
        let batches: Vec<usize> = (0..hidden.batches()).collect();
        let mut groups = batches.chunks(b.lanes()).peekable();
        while let Some(group) = groups.next() {
            let taken = group
                .iter()
                .map(|&batch| Ok((hidden.lens(batch).clone(), hidden.take(batch)?)))
                .collect::<Result<Vec<_>>>()?;
            let start = Instant::now();
            let arrived = b.at_once(taken, |(lens, at)| self.advance(block, span, &lens, at));
            let arrived = arrived.into_iter().collect::<Result<Vec<_>>>()?;
            hidden.carry(b, groups.peek().unwrap_or(&&[][..]))?;
            let tokens = group.iter().map(|&batch| hidden.lens(batch));
            let flops = tokens
                .map(|lens| forward_flops(self.arch, self.config, span.first(), span.end(), lens))
                .sum();
            times.charge(Phase::Forward, start.elapsed().as_secs_f64(), flops);

            for (&batch, at) in group.iter().zip(arrived) {
                let start = Instant::now();
                if let Some(input) = &at.input {
                    observe(b, input)?;
                }
                let lens = hidden.lens(batch);
                let flops = span.to.map_or(0.0, |point| self.statistic_flops(plan, point, lens));
                times.charge(Phase::Statistics, start.elapsed().as_secs_f64(), flops);

                // Inputs that follow a norm are recomputed from the residual stream when needed.
                let keep = matches!(span.to, Some(CapturePoint::AttnOut | CapturePoint::MlpHidden));
                let input = at.input.filter(|_| keep).map(Parked::Device);
                hidden.put(b, batch, Kept { residual: Parked::Device(at.residual), input })?;
                self.progress.advance(1);
            }
        }
        Ok(())
    }

    /// Brings one batch across `span`.
    fn advance(
        &self,
        block: &Block<B>,
        span: Span,
        lens: &SequenceLens,
        Kept { residual, input }: Kept<B>,
    ) -> Result<Activations<B>> {
        let b = self.backend;
        let residual = residual.onload(b)?;
        let input = match input {
            Some(input) => Some(input.onload(b)?),
            None => block.input_from_residual(b, span.first(), &residual)?,
        };
        let mut at = Activations { residual, input };
        for point in &CapturePoint::ALL[span.first() as usize..span.end()] {
            at = block.step(b, self.geometry, *point, at, lens)?;
        }
        Ok(at)
    }

    fn statistic(&self, kind: StatKind, point: CapturePoint) -> Result<Statistic<B>> {
        let features = self.config.capture_width(point);
        Ok(Statistic::new(self.backend, kind, features)?)
    }

    /// Solves the planned layers that share the input at `point`, one way of solving after the other:
    /// each takes all its layers at once, so that their Hessian is factorised once.
    fn solve_point(
        &self,
        plan: &BlockPlan,
        loaded: &mut LoadedBlock<B>,
        point: CapturePoint,
        statistic: &mut Statistic<B>,
        times: &mut PhaseTimes,
    ) -> Result<Vec<LayerReport>> {
        let mut reports = Vec::new();
        for (at, solved) in self.solved_at(plan, loaded, point, statistic, times)? {
            let rows = self.backend.count_non_finite_rows(&solved.weight)?;
            if rows > 0 {
                let layer = solved.report.layer;
                return Err(PipelineError::NonFiniteWeights { layer, rows });
            }
            loaded.linears[at].weight = LoadedWeight::Solved(solved.weight);
            loaded.linears[at].rounding = solved.rounding;
            reports.push(solved.report);
        }
        Ok(reports)
    }

    /// What the planned layers that share the input at `point` become, with their places in the block.
    fn solved_at(
        &self,
        plan: &BlockPlan,
        loaded: &LoadedBlock<B>,
        point: CapturePoint,
        statistic: &mut Statistic<B>,
        times: &mut PhaseTimes,
    ) -> Result<Vec<(usize, Solved<B>)>> {
        let b = self.backend;
        let mut all = Vec::new();
        let mut rest: Vec<&LayerPlan> = plan.layers_at(point).collect();
        while let Some(first) = rest.first() {
            let (way, sweeps) = (Way::of(first), f64::from(first.sweeps()));
            let (planned, others) = rest.iter().partition(|layer| Way::of(layer) == way);
            rest = others;
            let planned: Vec<&LayerPlan> = planned;
            let layers = planned
                .iter()
                .map(|layer| {
                    let linear = &loaded.linears[position(&loaded.linears, layer)?];
                    Ok(Layer {
                        name: layer.module.clone(),
                        weight: linear.matrix(b)?,
                        sparsity: layer.prune.map(|prune| prune.sparsity),
                        grid: layer.quantize.map(|quantize| quantize.grid),
                        keep_zeros: layer.keep_zeros,
                    })
                })
                .collect::<Result<Vec<_>>>()?;
            let mut spent = SolveTimes::default();
            let options = SolverOptions { act_order: way.act_order, ..self.options };
            let solver = solver::<B>(way.prune, way.quantize, options);
            let solved = solver.solve(b, layers, statistic, &mut spent)?;
            for (layer, solved) in planned.iter().zip(solved) {
                all.push((position(&loaded.linears, layer)?, solved));
            }
            let features = self.config.capture_width(point) as f64;
            let hessian = solver.needs() == StatKind::Hessian;
            let of_all = |flops: fn(f64, f64) -> f64| -> f64 {
                planned.iter().map(|layer| flops(layer.rows as f64, layer.cols as f64)).sum()
            };
            times.charge(
                Phase::Factor,
                spent.factor_secs,
                if hessian { sweeps * factor_flops(features) } else { 0.0 },
            );
            let swept = if hessian { sweeps * of_all(sweep_flops) } else { 0.0 };
            times.charge(Phase::Sweep, spent.sweep_secs, swept);
            // Two quadratic forms of a triangle each, and a third of what rounding to nearest gives.
            let forms = if way.quantize.is_some() { 3.0 } else { 2.0 };
            let formed = if hessian { forms * of_all(form_flops) } else { 0.0 };
            times.charge(Phase::Error, spent.error_secs, formed);
        }
        Ok(all)
    }

    /// Operations of adding a batch to the statistic of `point`.
    fn statistic_flops(&self, plan: &BlockPlan, point: CapturePoint, lens: &SequenceLens) -> f64 {
        let (tokens, features) = (lens.tokens() as f64, self.config.capture_width(point) as f64);
        match plan.needs_at(point) {
            StatKind::None => 0.0,
            StatKind::ColumnNorm => 2.0 * tokens * features,
            StatKind::Hessian => gram_flops(tokens, features),
        }
    }
}

/// How a layer is solved.
#[derive(Clone, Copy, PartialEq)]
struct Way {
    prune: Option<Method>,
    quantize: Option<Quantizer>,
    act_order: bool,
}

impl Way {
    fn of(layer: &LayerPlan) -> Self {
        Self {
            prune: layer.prune.map(|prune| prune.method),
            quantize: layer.quantize.map(|quantize| quantize.method),
            act_order: layer.quantize.is_some_and(|quantize| quantize.act_order),
        }
    }
}

/// Where a planned layer stands among the linears of its block.
fn position<B: Backend>(linears: &[LoadedLinear<B>], layer: &LayerPlan) -> Result<usize> {
    linears.iter().position(|linear| linear.role == layer.role).ok_or_else(|| {
        let (name, what) = (layer.module.clone(), "is planned but not in its block".to_owned());
        FormatError::Encoding { name, what }.into()
    })
}

fn check_finite<B: Backend>(block: usize, statistic: &Statistic<B>) -> Result<()> {
    let (bad, all) = (statistic.non_finite_tokens, statistic.tokens + statistic.non_finite_tokens);
    if bad * MAX_NON_FINITE > all {
        return Err(PipelineError::NonFiniteActivations { block, bad, all });
    }
    Ok(())
}
