"""Where the program under test and its model are, and what mpirun needs on a small or shared machine."""
import os
import pathlib

SOURCE = pathlib.Path(os.environ.get("SFUMATO_SOURCE_DIR", pathlib.Path(__file__).resolve().parents[2]))
BUILD = pathlib.Path(os.environ.get("SFUMATO_BUILD_DIR", SOURCE / "build"))
BINARY = BUILD / "sfumato"
TINY = SOURCE / "models" / "tiny"
MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
}
