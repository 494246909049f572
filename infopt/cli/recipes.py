"""`infopt recipes list | show | check | schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from infopt.cli.shell import AsJson, Device, Set

app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name.")]


@app.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with infopt."""
    from infopt import recipe, techniques

    found = [recipe.load(name, techniques.find) for name in recipe.shipped()]
    if as_json:
        rows = [{"name": each.name, "about": each.about, "steps": [step.as_dict() for step in each.steps]} for each in found]
        typer.echo(json.dumps({"schema_version": 1, "recipes": rows}, indent=2))
        return
    width = max(len(each.name) for each in found)
    for each in found:
        typer.echo(f"{each.name:<{width}}  {each.about}")


@app.command()
def show(name: Name, resolved: Annotated[bool, typer.Option(help="With every default written out.")] = False) -> None:
    """Print a recipe, comments included."""
    from infopt import recipe, techniques

    path = recipe.locate(name)
    typer.echo(recipe.load(str(path), techniques.find).as_yaml() if resolved else path.read_text(encoding="utf-8"), nl=False)


@app.command()
def check(
    names: Annotated[list[str], typer.Argument(help="Recipe files or names.")], overrides: Set = None, device: Device = "auto"
) -> None:
    """Check recipes: grammar, techniques, options, gates; and note what they need that this machine lacks."""
    from infopt import arms, techniques
    from infopt.needs import missing_need

    for name in names:
        found = arms.load_recipe(name, overrides or ())
        typer.echo(f"{name}: ok")
        for index, step in enumerate(found.steps):
            lacking = missing_need(techniques.find(step.name)(step.options).needs, device)
            if lacking:
                typer.echo(f"note: {name}: {found.place(index)}: {lacking.message}: {lacking.hint}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from infopt import recipe, techniques

    typer.echo(json.dumps(recipe.schema({name: techniques.find(name) for name in techniques.names()}), indent=2))
