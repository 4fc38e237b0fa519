"""What tokens cost: a table of prices by model, for `llmplane top` and the Prometheus rules."""

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from crds.meta import Model
from crds.problems import field_name
from crds.validation import findings

Price = Annotated[Decimal, Field(ge=0, allow_inf_nan=False)]
PER = 1_000_000
"""Prices are for a million tokens, as providers' price lists have them."""


class PricesError(ValueError):
    """A price table cannot be used; the text names the file and the field."""


class ModelPrice(Model):
    """The prices of one model, for a million tokens."""

    input: Price
    """Prompt tokens."""
    output: Price
    """Completion tokens, reasoning included."""
    cached_input: Price | None = None
    """Prompt tokens that the provider had in its cache; without it, as `input`."""


class Prices(Model):
    """A price table."""

    currency: str = "USD"
    models: Mapping[str, ModelPrice] = {}
    """By the name that is sent to the provider (label `model`)."""

    def cost(self, model: str, prompt: float, completion: float, cached: float = 0) -> Decimal | None:
        """Return what tokens cost; `cached` ones are part of `prompt`. None for a model without a price."""
        price = self.models.get(model)
        if price is None:
            return None
        of_cached = price.input if price.cached_input is None else price.cached_input
        total = (
            price.input * Decimal(prompt - cached)
            + of_cached * Decimal(cached)
            + price.output * Decimal(completion)
        )
        return total / PER


def read_prices(file: Path) -> Prices:
    """Read a price table from a YAML file. Raises PricesError."""
    try:
        return Prices.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PricesError(f"{file}: {error}") from None
    except ValidationError as error:
        texts = [f"{file}: {field_name(each.path)}: {each.message}" for each in findings(Prices, error)]
        raise PricesError("\n".join(texts)) from None


def prometheus_rules(prices: Prices) -> str:
    """Return a Prometheus rule file that knows the prices: `llmplane_price_per_token`, by model and kind.

    The kinds are ``input``, ``cached_input`` and ``output``.
    """
    rules = [
        {
            "record": "llmplane_price_per_token",
            "labels": {"model": model, "kind": kind, "currency": prices.currency},
            "expr": f"vector({price / PER:f})",
        }
        for model, price_of in prices.models.items()
        for kind, price in (
            ("input", price_of.input),
            ("cached_input", price_of.input if price_of.cached_input is None else price_of.cached_input),
            ("output", price_of.output),
        )
    ]
    text: str = yaml.safe_dump({"groups": [{"name": "llmplane-prices", "rules": rules}]}, sort_keys=False)
    return text
