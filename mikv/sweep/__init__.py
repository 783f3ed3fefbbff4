"""Sweeps: many runs from one command, one after the other, several at once, or as jobs of a Slurm cluster.

python run.py -m launcher=slurm ...           hydra_plugins/mikv_launcher.py -> launch -> launchers
python -m mikv.sweep status|rerun FOLDER      status <- folder (what jobs note), queue (what Slurm says)
"""
