"""Everything that only an NVIDIA GPU can show, as stages that can be stopped and continued: see ``run_all.sh``."""
