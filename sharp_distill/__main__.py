"""`python -m sharp_distill` is the command `sharp_distill`."""
if __name__ == "__main__":
    from sharp_distill.app.cli import run_cli
    run_cli()
