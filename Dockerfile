# The GPU image:  docker build -t megatron-safe . && docker run --gpus all --ipc=host megatron-safe
#
# NVIDIA's image brings torch, apex, Transformer Engine and flash-attn, built against each other. 25.11 because it has
# Transformer Engine 2.9, the oldest that Megatron-Core 0.16.1 names (>=2.9, <2.12).
FROM nvcr.io/nvidia/pytorch:25.11-py3

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/megatron-safe

# The dependencies, in a layer of their own that an edit of the code does not rebuild. Everything the image has is
# pinned to what it has, the rest to tools/constraints.txt; the build fails should anything of the image's be replaced.
COPY setup.py pyproject.toml ./
COPY tools/constraints.txt tools/
COPY megatron_safe/__init__.py megatron_safe/
COPY kernels/__init__.py kernels/
RUN pip list --format=freeze | sort > /tmp/image.txt \
 && awk -F== '{name = tolower($1); gsub(/[-_.]+/, "-", name)} \
        NR == FNR {image[name]; print; next} \
        /^[a-z]/ && !(name in image)' /tmp/image.txt tools/constraints.txt > /tmp/constraints.txt \
 && pip install --no-cache-dir --no-build-isolation -c /tmp/constraints.txt -e . \
 && replaced=$(comm -23 /tmp/image.txt <(pip list --format=freeze | sort)) \
 && if [[ -n "$replaced" ]]; then echo "replaced: $replaced" >&2; exit 1; fi \
 && rm /tmp/image.txt /tmp/constraints.txt \
 && useradd --create-home --uid 10001 --shell /bin/bash megatron

# The editable installation above points here, so the code needs no second installation.
COPY . .

USER 10001
WORKDIR /home/megatron
CMD ["megatron-safe", "--help"]
