"""What of a config enters an identity: everything, less fields that were added later and say nothing new."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field

from trainables.config import AddedLater, Config, NamesVector, recipe_of
from trainables.training_config import TrainingConfig


class Before(Config):
    rate: float
    names: tuple[str, ...] = ("a",)
    note: str | None = None


class After(Before):
    decay: Annotated[float, AddedLater(), Field(ge=0)] = 0.0
    kinds: Annotated[tuple[int, ...], AddedLater()] = Field(default_factory=tuple)
    vector: Annotated[str, NamesVector()] = "bridge"


class OuterBefore(Config):
    one: Before
    several: tuple[Before, ...] = ()
    by_name: dict[str, Before] = Field(default={})


class OuterAfter(Config):
    one: After
    several: tuple[After, ...] = ()
    by_name: dict[str, After] = Field(default={})
    later: Annotated[After | None, AddedLater()] = None


def test_without_added_fields_it_is_all_of_the_config() -> None:
    training = TrainingConfig(learning_rate=0.1)
    later = {"warmup_steps", "stop_if_loss_above", "watch"}
    plain = training.model_dump(mode="json", exclude={name: True for name in later} | {"lora": {"rslora", "layers"}})
    assert recipe_of(training) == plain
    assert recipe_of(training)["lora"]["target_modules"] is None


def test_an_added_field_at_its_default_changes_nothing() -> None:
    assert recipe_of(After(rate=1, decay=0, kinds=())) == recipe_of(Before(rate=1)) | {"vector": "bridge"}


@pytest.mark.parametrize(("field", "value", "plain"), [("decay", 0.5, 0.5), ("kinds", (1,), [1])])
def test_an_added_field_with_another_value_is_in_it(field: str, value: object, plain: object) -> None:
    config = After.model_validate({"rate": 1, field: value})
    assert recipe_of(config) == recipe_of(After(rate=1)) | {field: plain}


def test_configs_inside_are_treated_alike() -> None:
    def outer(inner: type[Before], model: type[Config]) -> dict[str, object]:
        one = inner(rate=1)
        return recipe_of(model.model_validate({"one": one, "several": (one, one), "by_name": {"x": one}}))

    def without_vector(plain: object) -> object:
        if isinstance(plain, dict):
            return {name: without_vector(item) for name, item in plain.items() if name != "vector"}
        return [without_vector(item) for item in plain] if isinstance(plain, list) else plain

    assert without_vector(outer(After, OuterAfter)) == outer(Before, OuterBefore)
    changed = OuterAfter(one=After(rate=1), several=(After(rate=1), After(rate=1, decay=2)), later=After(rate=3))
    assert recipe_of(changed)["several"][1]["decay"] == 2
    assert "decay" not in recipe_of(changed)["several"][0]
    assert recipe_of(changed)["later"] == recipe_of(After(rate=3))
