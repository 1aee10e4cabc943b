"""Deployment: merged layers and integer inference."""

from spikeformers.deploy.artifact import Artifact, ModelCard, load, save
from spikeformers.deploy.audit import AuditReport, audit
from spikeformers.deploy.fuse import fuse
from spikeformers.deploy.nir import LeftOut, NIRPart, NIRReport, export_nir
from spikeformers.deploy.onnx import export_onnx
from spikeformers.deploy.openvino import OpenVINOModel
from spikeformers.deploy.pictures import Framing, Letterbox, Preprocessing
from spikeformers.deploy.runtime import Agreement, IntegerModel, IntegerReport, LayerReport, integer
from spikeformers.deploy.stages import completed, first_stage
from spikeformers.deploy.unroll import BinarySpikes, IFNeuron, summed, unroll
from spikeformers.deploy.verdict import AuditRow, Merge

__all__ = [
    "Agreement",
    "Artifact",
    "AuditReport",
    "AuditRow",
    "BinarySpikes",
    "Framing",
    "IFNeuron",
    "IntegerModel",
    "IntegerReport",
    "LayerReport",
    "LeftOut",
    "Letterbox",
    "Merge",
    "ModelCard",
    "NIRPart",
    "NIRReport",
    "OpenVINOModel",
    "Preprocessing",
    "audit",
    "completed",
    "export_nir",
    "export_onnx",
    "first_stage",
    "fuse",
    "integer",
    "load",
    "save",
    "summed",
    "unroll",
]
