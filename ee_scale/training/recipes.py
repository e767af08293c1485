"""The recipes by the command that runs them."""

from typing import Any

from ee_scale.training.recipe import Recipe
from ee_scale.training.supernet import Supernet
from ee_scale.training.tune import Tune

RECIPES: dict[str, type[Recipe[Any, Any]]] = {recipe.verb: recipe for recipe in (Tune, Supernet)}
