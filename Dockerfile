# docker build -t effnet-quant .
# docker run --rm -it --gpus all --ipc=host -v <path to the images>:/data effnet-quant
FROM nvcr.io/nvidia/pytorch:25.08-py3

WORKDIR /workspace/effnet-quant

# The image's torch and torchvision are NVIDIA's own builds. Their versions are pre-releases to pip, which would replace
# them if it resolved setup.py's requirements. So the other requirements are listed here, as in setup.py, and the package
# itself is installed without any.
RUN pip install --no-cache-dir \
    "numpy>=1.26" \
    "onnx>=1.17" \
    "onnxruntime>=1.20" \
    "pillow>=10" \
    "pyyaml>=6" \
    "safetensors>=0.4.5" \
    "scikit-learn>=1.4" \
    "simplejpeg>=1.8" \
    "tqdm>=4.66" \
    "openvino>=2025.0" \
    "matplotlib>=3.8"

COPY setup.py pyproject.toml README.md LICENSE ./
COPY effnet_quant effnet_quant
COPY main.py quant_main.py launch.py multiproc.py checkpoint2model.py model2onnx.py model2trt.py classify.py ./
RUN pip install --no-cache-dir --no-deps --editable .
