"""``python -m lorc``, and the name that ``TORCH_LOGS="+lorc"`` goes by: torch takes it where a module is found."""

if __name__ == "__main__":
    from lorc_fx.cli import main

    main()
