"""A build backend that refuses: see pyproject.toml."""


def refuse(*args: object, **kwargs: object) -> str:
    raise SystemExit(
        "SPIN is not installed as a package: its modules have names such as `model` that others use, too. "
        "Run it from a checkout after `pip install -r requirements.txt`, or copy single files."
    )


build_wheel = build_sdist = build_editable = refuse
get_requires_for_build_wheel = get_requires_for_build_sdist = get_requires_for_build_editable = refuse
