//! Which layers a recipe means, and what it wants of each.
//!
//! Rules come first, in order; the first that names a layer decides. Every selector must match a layer.

use super::{
    error::Result,
    plan::{Pruning, contradiction},
    quantize::WantedScheme,
};
use crate::{
    compress::Choice,
    model::Role,
    recipe::{Recipe, RecipeError, Rule, Selector},
};

/// What is wanted of a layer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wanted {
    pub(super) prune: Option<Pruning>,
    pub(super) quantize: Option<WantedScheme>,
}

/// The selectors of a recipe.
#[derive(Debug)]
pub(super) struct Targets<'a> {
    recipe: &'a Recipe,
    matched: MatchLog<'a>,
}

impl<'a> Targets<'a> {
    /// Those of `recipe`.
    ///
    /// # Errors
    /// Rules that contradict themselves, or are exceptions of nothing.
    pub(super) fn new(recipe: &'a Recipe) -> Result<Self> {
        recipe.rules.iter().try_for_each(|rule| check_rule(recipe, rule))?;
        Ok(Self { recipe, matched: MatchLog::default() })
    }

    /// What is wanted of a linear of a decoder block.
    pub(super) fn of_linear(&mut self, module: &str, role: Role, block: usize) -> Wanted {
        self.of(&|selector| selector.matches(module, role.name(), block))
    }

    /// What is wanted of the embeddings or the output matrix.
    pub(super) fn of_table(&mut self, module: &str) -> Wanted {
        self.of(&|selector| selector.names_table(module))
    }

    fn of(&mut self, hits: &dyn Fn(&Selector) -> bool) -> Wanted {
        let (recipe, matched) = (self.recipe, &mut self.matched);
        let mut wanted = Wanted::default();
        if let Some(prune) = &recipe.prune {
            let targeted = matched.any("[prune] targets", &prune.targets, hits);
            let ignored = matched.any("[prune] ignore", &prune.ignore, hits);
            let pruning = Pruning { method: prune.method, sparsity: prune.sparsity };
            wanted.prune = (targeted && !ignored).then_some(pruning);
        }
        if let Some(quantize) = &recipe.quantize {
            let targeted = matched.any("[quantize] targets", &quantize.targets, hits);
            let ignored = matched.any("[quantize] ignore", &quantize.ignore, hits);
            wanted.quantize = (targeted && !ignored).then_some(WantedScheme {
                scheme: quantize.scheme,
                group_size: quantize.group_size,
            });
        }
        let mut decides = None;
        for rule in &recipe.rules {
            let hit = matched.any("[[rule]] targets", &rule.targets, hits);
            decides = decides.or(hit.then_some(rule));
        }
        match decides {
            Some(rule) => exception(recipe, rule, wanted),
            None => wanted,
        }
    }

    /// Refuses selectors that matched nothing. `example` is a name that exists.
    ///
    /// # Errors
    /// [`RecipeError::NoMatch`] naming the first.
    pub(super) fn check_all_matched(&self, example: &str) -> Result<()> {
        match self.matched.first_miss() {
            None => Ok(()),
            Some((place, selector)) => Err(RecipeError::NoMatch {
                selector: selector.to_string(),
                place,
                example: example.to_owned(),
            }
            .into()),
        }
    }
}

/// What `rule` makes of `wanted`. A rule also reaches layers that nothing else targets.
fn exception(recipe: &Recipe, rule: &Rule, wanted: Wanted) -> Wanted {
    if rule.dense {
        return Wanted::default();
    }
    let says_prune = rule.method.is_some() || rule.sparsity.is_some();
    let prune = match (&recipe.prune, rule.sparsity) {
        (None, _) | (_, Some(Choice::Leave)) => None,
        (Some(prune), Some(Choice::Take(sparsity))) => {
            Some(Pruning { method: rule.method.unwrap_or(prune.method), sparsity })
        }
        (Some(prune), None) if says_prune => {
            Some(Pruning { method: rule.method.unwrap_or(prune.method), sparsity: prune.sparsity })
        }
        (Some(_), None) => wanted.prune,
    };
    let quantize = match (&recipe.quantize, rule.quantize) {
        (None, _) | (_, Some(Choice::Leave)) => None,
        (Some(quantize), choice) => {
            let scheme = match choice {
                Some(Choice::Take(scheme)) => Some(scheme),
                _ => rule
                    .group_size
                    .map(|_| quantize.scheme)
                    .or(wanted.quantize.map(|wanted| wanted.scheme)),
            };
            // A group of the recipe's own scheme need not suit another.
            let inherited = quantize.group_size.filter(|_| scheme == Some(quantize.scheme));
            let group_size = rule.group_size.or(inherited);
            scheme.map(|scheme| WantedScheme { scheme, group_size })
        }
    };
    Wanted { prune, quantize }
}

fn check_rule(recipe: &Recipe, rule: &Rule) -> Result<()> {
    let targets: Vec<String> = rule.targets.iter().map(|target| format!("`{target}`")).collect();
    let refuse =
        |what: &str| Err(contradiction(format!("[[rule]] for {} {what}", targets.join(", "))));
    let prunes = rule.method.is_some() || rule.sparsity.is_some();
    let quantizes = rule.quantize.is_some() || rule.group_size.is_some();
    match () {
        () if recipe.prune.is_none() && recipe.quantize.is_none() => {
            refuse("needs a [prune] or [quantize] section to be an exception of")
        }
        () if rule.dense && prunes => {
            refuse("leaves layers dense and prunes them (give dense, or method and sparsity)")
        }
        () if rule.dense && quantizes => refuse(
            "leaves layers dense and quantizes them (give dense, or quantize and group_size)",
        ),
        () if prunes && recipe.prune.is_none() => {
            refuse("says how to prune, but there is no [prune] section")
        }
        () if quantizes && recipe.quantize.is_none() => {
            refuse("says how to quantize, but there is no [quantize] section")
        }
        () if rule.method.is_some() && rule.sparsity == Some(Choice::Leave) => {
            refuse("gives a method and the sparsity none")
        }
        () if rule.group_size.is_some() && rule.quantize == Some(Choice::Leave) => {
            refuse("gives a group size and quantizes nothing")
        }
        () if !(rule.dense || prunes || quantizes) => {
            refuse("says nothing (give dense, method, sparsity, quantize or group_size)")
        }
        () => Ok(()),
    }
}

/// Which selectors have been tried so far, where they stand, and whether they matched something.
#[derive(Debug, Default)]
struct MatchLog<'a>(Vec<(&'static str, &'a Selector, bool)>);

impl<'a> MatchLog<'a> {
    fn any(
        &mut self,
        place: &'static str,
        selectors: &'a [Selector],
        hits: &dyn Fn(&Selector) -> bool,
    ) -> bool {
        let mut any = false;
        for selector in selectors {
            let hit = hits(selector);
            // Equal selectors at two places are two.
            match self.0.iter_mut().find(|(_, known, _)| std::ptr::eq(*known, selector)) {
                Some((_, _, matched)) => *matched |= hit,
                None => self.0.push((place, selector, hit)),
            }
            any |= hit;
        }
        any
    }

    fn first_miss(&self) -> Option<(&'static str, &'a Selector)> {
        let miss = self.0.iter().find(|(_, _, matched)| !matched);
        miss.map(|(place, selector, _)| (*place, *selector))
    }
}
