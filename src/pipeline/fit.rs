//! A recipe that fits a size budget: every candidate is tried on every layer, and each layer gets the
//! one that makes the sum of relative output errors least within the budget.
//!
//! Errors are measured one layer at a time on the activations of the dense model, so they say nothing
//! of how errors of several layers add up; equal relative errors count alike wherever they are.

use std::collections::BTreeMap;

use super::{
    entry,
    error::Result,
    plan::{ConversionPlan, contradiction, without_budget},
    progress::{PhaseTimes, Progress},
    stages::StageContext,
};
use crate::{
    backend::{Backend, BackendJob, DeviceOptions, dispatch},
    calibration::CalibrationSet,
    compress::{Candidate, Choice, LayerReport, Method},
    model::{BlockGeometry, CapturePoint, ModelSource},
    recipe::{
        BudgetRecipe, OutputFormat, PruneRecipe, QuantizeRecipe, Recipe, Rule, Selector, Sequential,
    },
};

/// What fitting a budget came to.
#[derive(Debug, Clone)]
pub struct Fitted {
    /// The recipe, with a rule for each candidate that was chosen.
    pub recipe: Recipe,
    /// Layers and stored bits per weight of each candidate that was chosen.
    pub chosen: Vec<(Candidate, usize, f64)>,
    /// Stored bits per weight of all linears.
    pub bits_per_weight: f64,
}

/// One candidate for one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Offer {
    bits: u64,
    error: f64,
}

/// Candidates that a container holds, from about 2 to 9 bits a weight.
fn default_candidates(format: OutputFormat) -> &'static [&'static str] {
    match format {
        OutputFormat::Gguf => &["q8_0", "q6_k", "q5_0", "q4_0", "q3_k", "q2_k"],
        OutputFormat::CompressedTensors => &["int8", "int6", "int5", "int4", "int3", "int2"],
        _ => &["int8", "int6", "int5", "int4", "50% int4", "int3", "2:4 int4", "int2"],
    }
}

/// Measures the candidates of `recipe`'s budget and resolves it into rules.
///
/// # Errors
/// Sections that say what the budget is to decide, a candidate that does not suit a layer or the
/// container, a budget that even the smallest candidates exceed; as a conversion's solving.
pub fn fit(
    source: &ModelSource,
    recipe: &Recipe,
    calibration: Option<&CalibrationSet>,
    device: DeviceOptions,
    memory_bytes: Option<u64>,
    progress: &dyn Progress,
) -> Result<Fitted> {
    let Some(budget) = &recipe.budget else {
        return Err(contradiction("the recipe has no budget to fit".into()));
    };
    without_budget(recipe)?;
    let candidates = candidates(recipe, budget)?;
    let plans = candidates
        .iter()
        .map(|candidate| ConversionPlan::new(source, &alone(recipe, budget, *candidate)))
        .collect::<Result<Vec<_>>>()?;
    let Some(calibration) = calibration else {
        return Err(contradiction(
            "a budget needs calibration text: give --calibration FILE".into(),
        ));
    };
    let job = Measurement { source, plans: &plans, calibration, memory_bytes, progress };
    let reports = dispatch(device, job)??;

    let layers: Vec<&str> = plans[0]
        .blocks
        .iter()
        .flat_map(|block| &block.layers)
        .map(|layer| layer.module.as_str())
        .collect();
    let mut weights = 0;
    let mut options = Vec::with_capacity(layers.len());
    for (index, layer) in layers.iter().enumerate() {
        let name = format!("{layer}.weight");
        let mut of_layer = Vec::with_capacity(plans.len());
        for (plan, reports) in plans.iter().zip(&reports) {
            let bits = plan.output(&name)?.bytes * 8;
            let error = reports[index].relative_error.unwrap_or(f64::INFINITY);
            of_layer.push(Offer { bits, error });
        }
        weights += reports[0][index].weights;
        options.push(of_layer);
    }
    let allowed = (budget.target_bits * weights as f64) as u64;
    let Some(choice) = allocate(&options, allowed) else {
        let least: u64 = options.iter().filter_map(|o| o.iter().map(|o| o.bits).min()).sum();
        return Err(contradiction(format!(
            "the smallest candidates need {:.3} bits a weight, more than the {} of the budget; give \
             smaller ones with --candidates",
            least as f64 / weights as f64,
            budget.target_bits
        )));
    };
    let bits: u64 =
        options.iter().zip(&choice).map(|(options, chosen)| options[*chosen].bits).sum();
    let chosen = candidates
        .iter()
        .enumerate()
        .filter_map(|(index, candidate)| {
            let of = || (0..layers.len()).filter(|layer| choice[*layer] == index);
            let bits: u64 = of().map(|layer| options[layer][index].bits).sum();
            let weights: u64 = of().map(|layer| reports[0][layer].weights).sum();
            (weights > 0).then(|| (*candidate, of().count(), bits as f64 / weights as f64))
        })
        .collect();
    Ok(Fitted {
        recipe: resolved(recipe, budget, &candidates, &layers, &choice)?,
        chosen,
        bits_per_weight: bits as f64 / weights as f64,
    })
}

/// The candidates of a budget, checked.
fn candidates(recipe: &Recipe, budget: &BudgetRecipe) -> Result<Vec<Candidate>> {
    if recipe.prune.is_some() || recipe.quantize.is_some() || !recipe.rules.is_empty() {
        return Err(contradiction(
            "a budget decides what is pruned and quantized; leave out [prune], [quantize] and [[rule]]"
                .into(),
        ));
    }
    if !(budget.target_bits.is_finite() && budget.target_bits > 0.0) {
        return Err(contradiction(format!(
            "target_bits is {} (expected a positive number)",
            budget.target_bits
        )));
    }
    if budget.candidates.is_empty() {
        let format = recipe.output.format.unwrap_or(OutputFormat::Safetensors);
        let parse = |text: &&str| text.parse::<Candidate>().map_err(contradiction);
        return default_candidates(format).iter().map(parse).collect();
    }
    Ok(budget.candidates.clone())
}

/// The recipe that does the same to every layer.
fn alone(recipe: &Recipe, budget: &BudgetRecipe, candidate: Candidate) -> Recipe {
    Recipe {
        budget: None,
        prune: candidate.sparsity.map(|sparsity| PruneRecipe::new(Method::SparseGpt, sparsity)),
        quantize: candidate.scheme.map(|scheme| QuantizeRecipe {
            group_size: budget.group_of(scheme),
            ..QuantizeRecipe::new(scheme)
        }),
        ..recipe.clone()
    }
}

/// The recipe with a rule for each candidate that is chosen.
fn resolved(
    recipe: &Recipe,
    budget: &BudgetRecipe,
    candidates: &[Candidate],
    layers: &[&str],
    choice: &[usize],
) -> Result<Recipe> {
    let mut rules = BTreeMap::<usize, Vec<Selector>>::new();
    for (layer, chosen) in layers.iter().zip(choice) {
        let selector =
            layer.parse::<Selector>().map_err(|error| contradiction(error.to_string()))?;
        rules.entry(*chosen).or_default().push(selector);
    }
    let used: Vec<Candidate> = rules.keys().map(|index| candidates[*index]).collect();
    let sparsity = used.iter().find_map(|candidate| candidate.sparsity);
    let scheme = used.iter().find_map(|candidate| candidate.scheme);
    let leave = |asked: bool| asked.then_some(());
    Ok(Recipe {
        budget: None,
        prune: sparsity.map(|sparsity| PruneRecipe::new(Method::SparseGpt, sparsity)),
        quantize: scheme.map(QuantizeRecipe::new),
        rules: rules
            .into_iter()
            .map(|(index, targets)| {
                let Candidate { sparsity: own, scheme: grid } = candidates[index];
                Rule {
                    targets,
                    method: None,
                    sparsity: leave(sparsity.is_some())
                        .map(|()| own.map_or(Choice::Leave, Choice::Take)),
                    quantize: leave(scheme.is_some())
                        .map(|()| grid.map_or(Choice::Leave, Choice::Take)),
                    group_size: grid.and_then(|scheme| budget.group_of(scheme)),
                    dense: false,
                }
            })
            .collect(),
        ..recipe.clone()
    })
}

/// One option for each layer, of the least sum of errors within `allowed` bits: from the smallest
/// options, the step along a layer's lower convex hull that takes off most error for its bits comes
/// first. That is the optimum but for the last steps, which may not fit. `None` when nothing fits.
fn allocate(layers: &[Vec<Offer>], allowed: u64) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = layers.iter().map(|options| hull(options)).collect();
    let mut at = vec![0; layers.len()];
    let mut bits: u64 = layers.iter().zip(&hulls).map(|(o, hull)| o[hull[0]].bits).sum();
    if bits > allowed {
        return None;
    }
    let step = |layer: usize, at: usize| {
        let (options, hull) = (&layers[layer], &hulls[layer]);
        let (now, next) = (options[hull[at]], options[*hull.get(at + 1)?]);
        let more = next.bits - now.bits;
        Some((more, (now.error - next.error) / more as f64))
    };
    let mut open: Vec<usize> = (0..layers.len()).collect();
    loop {
        open.retain(|&layer| {
            step(layer, at[layer]).is_some_and(|(more, _)| bits + more <= allowed)
        });
        let gain = |layer: &&usize| step(**layer, at[**layer]).map_or(0.0, |(_, gain)| gain);
        let best = open.iter().max_by(|a, b| gain(a).total_cmp(&gain(b)));
        let Some(&layer) = best else { break };
        bits += step(layer, at[layer]).map_or(0, |(more, _)| more);
        at[layer] += 1;
    }
    Some(at.iter().zip(&hulls).map(|(at, hull)| hull[*at]).collect())
}

/// The options on the lower convex hull of error over bits, from the smallest on.
fn hull(options: &[Offer]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..options.len()).collect();
    order.sort_by(|&a, &b| {
        let by_bits = options[a].bits.cmp(&options[b].bits);
        by_bits.then(options[a].error.total_cmp(&options[b].error))
    });
    let slope = |a: usize, b: usize| {
        (options[b].error - options[a].error) / (options[b].bits - options[a].bits) as f64
    };
    let mut hull: Vec<usize> = Vec::new();
    for next in order {
        let Some(&last) = hull.last() else {
            hull.push(next);
            continue;
        };
        if options[next].bits == options[last].bits || options[next].error >= options[last].error {
            continue;
        }
        while let [.., before, last] = hull[..]
            && slope(before, last) >= slope(before, next)
        {
            hull.pop();
        }
        hull.push(next);
    }
    hull
}

/// Solves every layer in every way on the activations of the dense model.
struct Measurement<'a> {
    source: &'a ModelSource,
    plans: &'a [ConversionPlan],
    calibration: &'a CalibrationSet,
    memory_bytes: Option<u64>,
    progress: &'a dyn Progress,
}

impl BackendJob for Measurement<'_> {
    /// For each plan, the reports of all its layers in order.
    type Output = Result<Vec<Vec<LayerReport>>>;

    fn run<B: Backend>(self, b: &B) -> Self::Output {
        let (arch, config) = (self.source.arch(), self.source.config());
        let (set, budget) = (self.calibration, &self.plans[0].budget);
        let geometry = BlockGeometry::new(b, arch, config, entry::window_of(set))?;
        let directory = std::env::temp_dir();
        let mut hidden = entry::store(b, set, config, budget, self.memory_bytes, &directory)?;
        entry::embed_windows(b, self.source, set, &mut hidden)?;
        let stages = StageContext {
            backend: b,
            arch,
            config,
            geometry: &geometry,
            options: self.plans[0].solver_options(),
            sequential: Sequential::True,
            progress: self.progress,
        };
        let blocks = self.plans[0].blocks.len();
        // The four capture points and the end of each block.
        let passes = CapturePoint::ALL.len() as u64 + 1;
        self.progress.start(blocks as u64 * passes * hidden.batches() as u64);
        let mut reports = vec![Vec::new(); self.plans.len()];
        let mut times = PhaseTimes::default();
        for block in 0..blocks {
            self.source.prefetch(block + 1);
            let plans: Vec<_> = self.plans.iter().map(|plan| &plan.blocks[block]).collect();
            let measured = stages.measure_block(&plans, self.source, &mut hidden, &mut times)?;
            reports.iter_mut().zip(measured).for_each(|(all, more)| all.extend(more));
            self.source.release(block);
        }
        self.progress.finish();
        Ok(reports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(u64, f64)]) -> Vec<Offer> {
        pairs.iter().map(|&(bits, error)| Offer { bits, error }).collect()
    }

    #[test]
    fn options_that_cost_more_for_less_are_never_chosen() {
        // The third lies above the line from the second to the fourth; the last is worse than it.
        let layer = options(&[(20, 1.0), (30, 0.4), (40, 0.39), (50, 0.1), (60, 0.2)]);
        assert_eq!(hull(&layer), [0, 1, 3]);
        assert_eq!(hull(&options(&[(30, 0.5), (30, 0.4), (20, 0.4)])), [2]);
    }

    #[test]
    fn the_budget_goes_where_it_helps_most() {
        let cheap = options(&[(20, 1.0), (40, 0.9)]);
        let dear = options(&[(20, 9.0), (40, 1.0)]);
        assert_eq!(allocate(&[cheap.clone(), dear.clone()], 60), Some(vec![0, 1]));
        assert_eq!(allocate(&[cheap.clone(), dear.clone()], 79), Some(vec![0, 1]));
        assert_eq!(allocate(&[cheap.clone(), dear.clone()], 80), Some(vec![1, 1]));
        assert_eq!(allocate(&[cheap, dear], 39), None);
    }

    #[test]
    fn the_choice_is_the_best_of_all_where_steps_are_equal() {
        // Three layers of convex errors and steps of one size: greedy is optimal.
        let layers: Vec<_> = [3.0, 1.0, 0.2]
            .map(|scale: f64| {
                options(&[2, 3, 4, 5].map(|bits| (bits, scale * 0.25f64.powi(bits as i32))))
            })
            .to_vec();
        for allowed in 6..=15 {
            let choice = allocate(&layers, allowed).unwrap();
            let sum = |choice: &[usize]| -> (u64, f64) {
                let of = layers.iter().zip(choice).map(|(options, &chosen)| options[chosen]);
                of.fold((0, 0.0), |sum, option| (sum.0 + option.bits, sum.1 + option.error))
            };
            let best = (0..64)
                .map(|i| sum(&[i % 4, i / 4 % 4, i / 16]))
                .filter(|(bits, _)| *bits <= allowed)
                .map(|(_, error)| error)
                .fold(f64::INFINITY, f64::min);
            let (bits, error) = sum(&choice);
            assert!(bits <= allowed);
            assert!((error - best).abs() < 1e-12, "{allowed}: {error} {best}");
        }
    }
}
