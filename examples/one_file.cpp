// Explains an image with a file of `camrt compile`, by ONNX Runtime alone: no Python, no camrt.
//
//   g++ -std=c++17 -O2 -I INCLUDE one_file.cpp -L LIB -lonnxruntime -o one_file
//   ./one_file winsor_cam.onnx image.f32 -1 90 map.npy
//
// INCLUDE, LIB: of ONNX Runtime's release, or Debian's libonnxruntime-dev. image.f32: the network's preprocessed input
// as raw float32 numbers (in NumPy: x.tofile("image.f32")). Then the class (-1: the top class) and the percentile.
#define ORT_API_MANUAL_INIT  // a library older than the header is then an error that says so
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

using std::string;

static std::vector<float> read_image(const string& path, size_t count) {
  std::vector<float> values(count);
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  file.read(reinterpret_cast<char*>(values.data()), std::streamsize(count * sizeof(float)));
  if (!file || file.peek() != std::ifstream::traits_type::eof())
    throw std::runtime_error(path + ": the network takes " + std::to_string(count) + " float32 numbers");
  return values;
}

// NumPy's format 1.0: a header whose length is a multiple of 64, then the numbers.
static void write_npy(const string& path, const float* map, int64_t height, int64_t width) {
  string said = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(height) + ", " +
                std::to_string(width) + "), }";
  said.append(63 - (10 + said.size()) % 64, ' ') += '\n';
  std::ofstream file(path, std::ios::binary);
  file << string("\x93NUMPY\x01\x00", 8) << char(said.size() & 255) << char(said.size() >> 8) << said;
  file.write(reinterpret_cast<const char*>(map), std::streamsize(sizeof(float)) * height * width);
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

static int64_t explain(char** argv) {
  const OrtApi* api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!api) throw std::runtime_error(string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() + " is too old");
  Ort::InitApi(api);
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "one_file");  // errors come as exceptions
  Ort::Session session(env, argv[1], Ort::SessionOptions());
  std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  if (shape.size() != 4 || session.GetInputCount() != 3)
    throw std::runtime_error(string(argv[1]) + ": takes other inputs than image, target and percentile");
  shape[0] = 1;
  std::vector<float> image = read_image(argv[2], size_t(shape[1] * shape[2] * shape[3]));
  int64_t target = std::stoll(argv[3]), one = 1;
  float percentile = std::stof(argv[4]);

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value inputs[] = {
      Ort::Value::CreateTensor<float>(memory, image.data(), image.size(), shape.data(), shape.size()),
      Ort::Value::CreateTensor<int64_t>(memory, &target, 1, &one, 1),
      Ort::Value::CreateTensor<float>(memory, &percentile, 1, &one, 1)};
  const char* names[] = {"image", "target", "percentile"};
  const char* outputs[] = {"map", "logits"};
  const auto results = session.Run(Ort::RunOptions(), names, inputs, 3, outputs, 2);

  const float* logits = results[1].GetTensorData<float>();
  const auto classes = int64_t(results[1].GetTensorTypeAndShapeInfo().GetElementCount());
  if (target < -1 || target >= classes)
    throw std::runtime_error("class " + std::to_string(target) + ": there are " + std::to_string(classes));
  write_npy(argv[5], results[0].GetTensorData<float>(), shape[2], shape[3]);
  return target < 0 ? std::max_element(logits, logits + classes) - logits : target;
}

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: one_file FILE.onnx IMAGE.f32 CLASS PERCENTILE MAP.npy\n";
    return 2;
  }
  try {
    std::cout << "class " << explain(argv) << '\n';
  } catch (const std::exception& error) {
    std::cerr << "one_file: " << error.what() << '\n';
    return 1;
  }
}
