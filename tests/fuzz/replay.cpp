// Runs a fuzzer's function on files, and on numbers drawn from a seed: for compilers without libFuzzer,
// and for ThreadSanitizer.
//     replay RANDOM_INPUTS FILE_OR_FOLDER...
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int main(int argc, char** argv) {
  namespace fs = std::filesystem;
  std::vector<fs::path> files;
  for (int i = 2; i < argc; ++i) {
    if (fs::is_directory(argv[i])) {
      for (const auto& entry : fs::recursive_directory_iterator(argv[i])) {
        if (entry.is_regular_file()) files.push_back(entry.path());
      }
    } else {
      files.emplace_back(argv[i]);
    }
  }
  for (const fs::path& path : files) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "cannot read %s\n", path.c_str());
      return 1;
    }
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    std::fprintf(stderr, "%s\n", path.c_str());
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  }
  const long random = argc > 1 ? std::atol(argv[1]) : 0;
  std::mt19937_64 engine(1);
  std::vector<std::uint8_t> bytes;
  for (long i = 0; i < random; ++i) {
    bytes.resize(engine() % 700);
    for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(engine());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%zu files and %ld random inputs\n", files.size(), random);
  return files.empty() && random == 0 ? 1 : 0;
}
