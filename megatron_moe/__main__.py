"""``python -m megatron_moe`` is the command ``megatron-moe``."""

from megatron_moe.cli.main import main

if __name__ == "__main__":
    main()
