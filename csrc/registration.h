// Registers a backend's ops under the name that this copy of the library carries.
#pragma once

#include "stable.h"

#include <cstdio>
#include <exception>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace clipsteer {

using torch::stable::detail::StableLibrary;

namespace {

// What the namespace of the ops begins with, behind the colon. A copy that is published has another name written into
// this field, so that it lives in one process with others; volatile, for the compiler must not know what stands here.
constexpr size_t kNameField = 96;
const volatile char name_field[kNameField] = "clipsteer's ops are named:clipsteer";

// The ops of one backend, for as long as the library is open. A namespace can be defined once in a process, and torch
// ends the process on the second attempt; here the second copy registers nothing and says why.
class Registration {
 public:
  struct Part {
    StableLibrary::Kind kind;
    const char* key;
    void (*fill)(StableLibrary&);
  };

  Registration(const char* backend, std::initializer_list<Part> parts) {
    const std::string space = name() + "_" + backend;
    try {
      TorchLibraryHandle probe = nullptr;
      if (aoti_torch_library_init_def(space.c_str(), __FILE__, __LINE__, &probe) != AOTI_TORCH_SUCCESS) {
        refusal_ = "another copy of this library defines torch.ops." + space + " in this process; this one is not used";
      } else {
        aoti_torch_delete_library_object(probe);
        for (const Part& part : parts) {
          libraries_.push_back(
              std::make_unique<StableLibrary>(part.kind, space.c_str(), part.key, __FILE__, __LINE__));
          part.fill(*libraries_.back());
        }
      }
    } catch (const std::exception& error) {
      libraries_.clear();
      refusal_ = "torch.ops." + space + " cannot be defined: " + error.what();
    }
    if (!refusal_.empty()) std::fprintf(stderr, "clipsteer: %s\n", refusal_.c_str());
  }

  // Why nothing was registered, or null.
  const char* refusal() const { return refusal_.empty() ? nullptr : refusal_.c_str(); }

 private:
  static std::string name() {
    std::string field;
    for (size_t i = 0; i < kNameField && name_field[i] != '\0'; ++i) field += name_field[i];
    return field.substr(field.find(':') + 1);
  }

  std::vector<std::unique_ptr<StableLibrary>> libraries_;
  std::string refusal_;
};

}  // namespace
}  // namespace clipsteer
