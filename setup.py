"""What pyproject.toml cannot say: folders at the root that a wheel has in the package; see `mst_ds.files.shipped`."""

from setuptools import find_namespace_packages, setup

FOLDERS = {"mst_ds.ds_configs": "ds_configs", "mst_ds.sweeps": "launch/sweeps", "mst_ds.slurm": "slurm"}

setup(
    packages=[*find_namespace_packages(include=["mst_ds*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "mst_ds": ["model_configs/**/config.json", "model_shape/known_models.json", "py.typed"],
        "mst_ds.ds_configs": ["*.json"],
        "mst_ds.slurm": ["rank.sh", "stoppable.sh"],
        "mst_ds.sweeps": ["*.yaml"],
    },
)
